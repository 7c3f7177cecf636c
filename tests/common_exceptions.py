"""What of transformers' common tests does not pass or does not run here, and why: see `common_model_tests.py`.

Keys are patterns as of a shell. A test that fails or is skipped without standing here is a mistake, and so is an entry
that nothing matches any more.
"""

from __future__ import annotations

# Tests that fail.
FAILS = {
    "Vision.test_model_get_set_embeddings": "it asks for an embedding of words; a ViT's is a convolution",
    "Text.test_eager_matches_sdpa_inference_*_pad_left": "titles padded on the left are refused: their first token is "
    "the one that is read",
    "Text.test_eager_matches_sdpa_inference_*_pad_left_[so]*": "as those before",
    "Retrieval.test_eager_matches_sdpa_inference_*_pad_left": "as those of the text model",
    "Retrieval.test_eager_matches_sdpa_inference_*_pad_left_[so]*": "as those of the text model",
    "Retrieval.test_attention_outputs": "it looks for one list of attentions, and this model has three passes, whose "
    "outputs are called as CLIP's are; Vision and Text pass it, and so do the tests of get_*_features",
    "Retrieval.test_hidden_states_output": "three passes, as in test_attention_outputs",
    "Retrieval.test_retain_grad_hidden_states_attentions": "three passes, as in test_attention_outputs",
    "Retrieval.test_model_weights_reload_no_missing_tied_weights": "it loads a file without weights: a file that lacks "
    "any is refused, and they are not drawn at random",
    "Retrieval.test_can_init_all_missing_weights": "as the one before; Vision and Text, which don't refuse, pass it",
    "Processor.test_init_arguments_not_in_processor_kwargs": "max_length is set once, for all calls, and a call may "
    "replace it: two places, of which the second is that of every tokenizer",
    "Processor.test_processor_from_and_save_pretrained*": "a saved processor names its code in auto_map, one that was "
    "just made has none: so it is with every processor whose code comes from the Hub",
    "Processor.test_subprocessor_defaults_preserved_by_kwargs_0_images": "titles are padded to the longest of a call, "
    "whatever the tokenizer was set to: the model's results don't depend on padding, its time does",
}

# How transformers tells why it skips.
SKIPS = {
    "This model has no `base_model_class` defined in tester.": "tests of rotary positions, which no model here has",
    "Processor has no chat template": "retrieval has no chat",
    "Processor doesn't accept chat templates at input": "retrieval has no chat",
    "Processor doesn't support `_get_num_multimodal_tokens` yet": "no token of a title stands for a photo",
    "ModelTester is not configured to run training tests": "the towers alone have no loss; Retrieval runs them",
    "video_processor attribute not present in *": "it takes no videos",
    "feature_extractor attribute not present in *": "it takes no sound",
    "Model does not have a TP plan.": "no tensor parallelism: the model fits every device",
    "test_resize_embeddings is set to `False`": "photos have no vocabulary; Text and Retrieval run them",
    "This model has no sparse experts.": "it has none",
    "This model has no `output_router_logits` in its config.": "it has no experts",
    "*does not support grouped_mm": "it has no experts",
    "This model doesn't use `inputs_embeds`": "titles are given as ids",
    "No sequence-to-sequence language modeling head to check": "it has none",
    "No decoder-only language modeling head to check": "it has none",
    "Model does not support sliding window mask": "titles are short, and photos are seen whole",
    "Model does not have position embeddings": "they are resized by resize_image(), which is no method of transformers",
    "This model is not composite": "of the towers; Retrieval runs it",
    "No subconfigs so the test does not make sense": "of the towers; Retrieval runs it",
    "Model is not a composite model.": "of the towers; Retrieval runs it",
    "No conversion found for *": "names of weights are those of the file",
    "*does not support SDPA": "said of a test for composite models where the model is none, and the other way round",
    "Model does not have both a non-text modality tower and a language sub-model*": "it has no language model",
    "*_keep_in_fp32_modules*": "of the towers: only Retrieval has a weight that stays in fp32, and runs them",
    "*not in MODEL_MAPPING": "code from the Hub is in no table of transformers",
}

# What a machine or an installation may lack: these run elsewhere.
NEEDS = {
    "test requires *": "accelerators, attention kernels, or libraries for sound and videos",
    "test is slow": "runs with RUN_SLOW=1",
}
