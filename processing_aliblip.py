"""Processor of AliBLIP: photos to pixels and titles to token ids, the deterministic view of evaluation and search.

    processor = AliBlipProcessor.from_pretrained(folder)
    batch = processor(images=[photo], text=["red cotton t-shirt"], return_tensors="pt")

Photos go through Pillow alone, so that the pixels do not depend on whether torchvision happens to be installed: bicubic
resize to a square, CLIP's mean and deviation. Titles go through a WordPiece tokenizer with BLIP's two tokens added.
"""

from typing import Any

from transformers import BlipImageProcessorPil, ProcessorMixin


class AliBlipProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: a BLIP image processor of any backend (it is replaced by the Pillow one of equal settings), or
            None for 384 px.
        tokenizer: a fast one that puts `[CLS]`, or what it calls so, first; `[DEC]` and `[ENC]` are added where it has
            none.
        max_length: longest title in tokens, `[CLS]` and `[SEP]` included; longer ones are cut.

    Raises:
        ValueError: no tokenizer, or a `max_length` that leaves no room for a word.
    """

    def __init__(self, image_processor=None, tokenizer=None, max_length: int = 35, **kwargs):
        if tokenizer is None:
            raise ValueError(
                "AliBlipProcessor needs a tokenizer: give a fast WordPiece tokenizer such as BertTokenizer"
            )
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 3:
            raise ValueError(f"max_length is {max_length!r}: it must be a whole number of at least 3 tokens")
        if image_processor is None:
            image_processor = BlipImageProcessorPil()
        elif not isinstance(image_processor, BlipImageProcessorPil):
            # The automatic class prefers torchvision where it is installed, and resizes differently then.
            settings = image_processor.to_dict()
            image_processor = BlipImageProcessorPil(
                **{
                    key: value
                    for key, value in settings.items()
                    if key in BlipImageProcessorPil.valid_kwargs.__annotations__
                }
            )
        # BLIP's order and roles: [DEC] is the first added id, [ENC] the second (30522 and 30523 with BERT's
        # vocabulary).
        own_bos = tokenizer.bos_token not in (None, "[DEC]")  # as XLM-R's <s>, which begins its titles
        tokenizer.add_special_tokens({"additional_special_tokens": ["[DEC]"]} if own_bos else {"bos_token": "[DEC]"})
        if "[ENC]" not in tokenizer.get_added_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        tokenizer.padding_side = "right"  # the first token is [CLS], or [ENC] when the model looks at an image
        # The model knows no token types, whoever calls the tokenizer, also one that is saved and loaded without this.
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
        self.max_length = max_length
        super().__init__(image_processor, tokenizer, **kwargs)

    @property
    def enc_token_id(self) -> int:
        """Id of `[ENC]`, for `AliBlipConfig.enc_token_id`."""
        return self.tokenizer.convert_tokens_to_ids("[ENC]")

    @property
    def image_size(self) -> int:
        """Side of the square that photos are resized to, in pixels."""
        return self.image_processor.size["height"]

    def __call__(self, images: Any = None, text: Any = None, **kwargs):
        """Photos (PIL or arrays) and titles (str) to `pixel_values` (B, 3, H, H) and `input_ids`, `attention_mask` (B,
        L).

        Titles are padded to the longest of the call and cut at `max_length` unless the call says otherwise.

        Raises:
            ValueError: titles are to be padded on the left, where the model reads their first token.
        """
        if text is not None:
            text_kwargs = kwargs.setdefault("text_kwargs", {}) if "text_kwargs" in kwargs else kwargs
            for key, value in (
                ("padding", True),
                ("truncation", True),
                ("max_length", self.max_length),
                ("padding_side", "right"),
                ("return_token_type_ids", False),
            ):
                text_kwargs.setdefault(key, value)
            if text_kwargs["padding_side"] != "right":
                raise ValueError("padding_side is 'left', but the model reads the first token of a title: leave it out")
        return super().__call__(images=images, text=text, **kwargs)


AliBlipProcessor.register_for_auto_class()

__all__ = ["AliBlipProcessor"]
