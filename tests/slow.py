"""Which tests are slow: `make check` leaves them out.

Those that start processes or a browser are found by what they and their fixtures call, so that nobody has to mark them.
Those that take more than a second in this process stand in a list; `pytest -m "not slow" --durations 20` shows others.
"""

from __future__ import annotations

import inspect
import multiprocessing
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import forks
import pytest

from aliblip.prepare import main as prepare

TESTS = Path(__file__).resolve().parent
_STARTERS = (subprocess, multiprocessing, forks, prepare)  # the last starts workers
_BROWSER = "sync_playwright"
# They train, evaluate or draw for more than a second.
SLOW_HERE = {
    "test_a_bug_keeps_its_traceback",
    "test_a_changed_counter_is_refused_too_and_a_checkpoint_without_checksums_is_taken",
    "test_a_checkpoint_is_a_model",
    "test_a_command_asks_nothing_even_where_somebody_would_answer",
    "test_a_damaged_index_is_ignored_and_written_anew",
    "test_a_folder_of_photos_then_changes",
    "test_a_gallery_at_an_address",
    "test_a_half_made_file_of_all_pairs_is_made_again",
    "test_a_hub_that_dies_ends_no_run",
    "test_a_list_of_addresses_and_an_address_with_a_query",
    "test_a_loss_that_is_not_finite_ends_an_fp16_run_as_any_other",
    "test_a_model_of_the_published_loss_keeps_its_weight",
    "test_a_place_that_can_not_be_reached",
    "test_a_process_that_reads_by_itself_and_works_is_left_alone",
    "test_a_process_that_reads_by_itself_ends_where_nothing_comes",
    "test_a_profile_changes_nothing_and_is_replaced_with_its_run",
    "test_a_reader_that_works_is_waited_for",
    "test_a_run_can_end_early_at_the_end_of_an_epoch_and_when_it_goes_on",
    "test_a_run_computed_the_plain_way_is_the_same_run",
    "test_a_run_ends_after_evaluations_without_gain",
    "test_a_run_goes_on_with_the_titles_of_its_queue",
    "test_a_run_in_8_bits_learns_as_one_in_16_and_goes_on_without",
    "test_a_run_in_fp16_is_near_the_one_in_fp32_and_ends_with_a_model",
    "test_a_run_learns_that_titles_of_one_photo_belong_together",
    "test_a_run_leaves_its_best_model_on_the_hub",
    "test_a_run_of_adapters_resumes_bit_by_bit",
    "test_a_run_of_version_0_1_0_goes_on_in_its_order",
    "test_a_run_that_dies_before_its_evaluation_makes_it_when_it_goes_on",
    "test_a_run_that_goes_on_with_other_parts_says_so",
    "test_a_second_start_with_other_slices_is_refused",
    "test_a_server_that_fails_for_good_ends_the_run",
    "test_a_start_that_was_interrupted_goes_on",
    "test_a_step_in_fp16_waits_no_more_often_than_others",
    "test_a_step_that_overflows_changes_nothing_and_halves_the_scale",
    "test_a_tar_that_is_cut_off_anywhere_is_refused",
    "test_a_value_that_is_the_beginning_of_many_others_is_refused",
    "test_adapters_alone_are_trained_and_saved",
    "test_all_pairs_equal_every_pair_scored_one_by_one",
    "test_an_adapter_is_loaded_measured_and_merged",
    "test_an_address_has_an_end_whatever_its_server_does",
    "test_an_example_is_searched_for_and_no_other_number_is",
    "test_an_exported_model_takes_batches_of_any_size",
    "test_an_index_by_name_and_none",
    "test_another_model_is_refused_until_it_may_replace_what_is_there",
    "test_apart_with_product_ids_there_is_a_recall",
    "test_batches_are_those_of_the_epochs_one_after_the_other",
    "test_both_directions_equal_the_protocol_of_several_titles_a_photo",
    "test_changes_go_on_while_an_index_is_made_and_pieces_are_joined",
    "test_compiled_towers_compute_rows_again_as_plain_ones_do",
    "test_compiled_towers_give_the_losses_and_gradients_of_plain_ones",
    "test_evaluation_units_over_a_bad_connection",
    "test_every_answer_while_rows_are_changed_is_one_of_some_version",
    "test_every_form_of_queries",
    "test_every_layout_streams_with_a_corrupt_image_as_a_hole",
    "test_every_start_step_is_the_tail_of_the_epoch",
    "test_flags_of_the_machine_are_tried",
    "test_frozen_parts_take_what_torch_counts",
    "test_gallery_in_small",
    "test_how_a_step_grows",
    "test_lancedb_opens_the_same_table",
    "test_lora_trains_its_adapters_alone_and_they_load",
    "test_many_threads_get_what_one_gets",
    "test_memory_and_disk_that_do_not_suffice",
    "test_neither_depth_nor_drop_path_nor_the_length_of_titles_makes_graphs",
    "test_new_rows_are_found_at_once_and_old_vectors_are_gone",
    "test_nothing_is_compiled_while_it_pauses",
    "test_nothing_is_deleted_before_the_trackers_have_begun",
    "test_of_a_whole_competition_only_the_listed_names_are_looked_for_and_few_are_spelled_out",
    "test_one_flipped_bit_is_refused_and_an_older_checkpoint_proposed",
    "test_operators_of_an_image_stay_few",
    "test_photos_and_titles_apart_give_the_rankings_of_the_table",
    "test_planted_duplicates_are_found_and_nothing_else",
    "test_readers_end_with_the_process_that_started_them",
    "test_results_equal_every_pair_scored_one_by_one",
    "test_retrieval_against_transformers_blip",
    "test_retrieval_refuses_sides_that_differ",
    "test_rows",
    "test_rows_computed_again_have_the_dropout_of_the_first_time",
    "test_rows_of_a_data_set_keep_their_ids_and_photos_inside_it_are_told",
    "test_settings_with_which_a_run_can_not_learn_are_told",
    "test_several_trackers_are_told_everything_and_their_runs_go_on",
    "test_step_against_the_plain_way",
    "test_step_refuses_sides_that_differ",
    "test_steps_and_epochs_are_evaluated_and_the_best_of_all_is_kept",
    "test_the_api_is_two_named_endpoints_and_nothing_of_the_page",
    "test_the_card_finds_the_evaluation_of_its_weights_wherever_it_lies",
    "test_the_loader_reads_it",
    "test_the_log_has_the_meters",
    "test_the_pairs_are_the_same_however_the_photos_are_cut_into_blocks",
    "test_the_readers_of_a_run_last_over_its_epochs",
    "test_the_restart_command_works_at_any_moment",
    "test_the_same_at_an_address",
    "test_the_same_rows_in_the_same_order_over_a_bad_connection",
    "test_the_script_says_photos_and_titles_and_its_files_have_each_photo_once",
    "test_the_token_is_written_nowhere",
    "test_the_weight_is_tuned_on_another_split_stored_and_used",
    "test_there_and_back_through_every_form",
    "test_trainer_evaluates_the_same_weights_to_the_same_loss",
    "test_trainer_fine_tunes_and_evaluates",
    "test_waits_and_operators_of_a_step",
    "test_waits_and_operators_of_a_step_of_two_batches",
    "test_waits_and_operators_of_a_step_with_an_option",
    "test_waits_and_operators_of_a_step_with_negatives_from_all_ranks",
    "test_waits_and_operators_of_a_step_with_several_negatives_from_all_ranks",
    "test_waits_and_operators_of_a_step_with_several_ranks",
    "test_weight_and_probability_are_tuned_together_and_mistakes_are_told",
    "test_what_a_server_may_do_instead_is_explained",
    "test_what_fails_after_the_work_is_made_up_for_without_doing_it_again",
    "test_what_goes_wrong_in_a_search_is_logged_and_not_told",
    "test_what_is_frozen_stays_and_a_resumed_run_repeats_it",
    "test_what_more_negatives_cost",
    "test_what_the_border_of_two_epochs_costs",
    "test_workers_leave_the_connections_of_their_parent_alone",
}


def is_slow(item: pytest.Item) -> bool:
    """Whether a test starts a process or a browser, or is in the list."""
    fixtures = [fixture.func for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures]
    return item.originalname in SLOW_HERE or _starts_processes(item.function, *fixtures)


def _starts_processes(*called: object) -> bool:
    """Whether what is called, or anything of the tests that it calls in turn, names what starts processes."""
    waiting, seen = list(called), set()
    while waiting:
        found = waiting.pop()
        if any(found is starter for starter in _STARTERS):
            return True
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, type) and _is_of_tests(found):
            waiting += vars(found).values()
        elif callable(found) and isinstance(function := inspect.unwrap(found), FunctionType) and _is_of_tests(function):
            names = {name for code in _codes(function.__code__) for name in code.co_names}
            if _BROWSER in names:
                return True
            values = [function.__globals__[name] for name in names if name in function.__globals__]
            modules = [value for value in values if isinstance(value, ModuleType) and _is_of_tests(value)]
            waiting += [*values, *(vars(module)[name] for module in modules for name in names & vars(module).keys())]
    return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_of_tests(found: object) -> bool:
    try:
        return Path(inspect.getfile(found)).resolve().parent == TESTS
    except (OSError, TypeError):  # built in
        return False
