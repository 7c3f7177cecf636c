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
    "test_a_changed_counter_is_refused_too_and_a_checkpoint_without_checksums_is_taken",
    "test_a_hub_that_dies_ends_no_run",
    "test_a_run_leaves_its_best_model_on_the_hub",
    "test_a_second_start_with_other_slices_is_refused",
    "test_a_server_that_fails_for_good_ends_the_run",
    "test_a_start_that_was_interrupted_goes_on",
    "test_all_pairs_equal_every_pair_scored_one_by_one",
    "test_an_example_is_searched_for_and_no_other_number_is",
    "test_another_model_is_refused_until_it_may_replace_what_is_there",
    "test_compiled_towers_compute_rows_again_as_plain_ones_do",
    "test_compiled_towers_give_the_losses_and_gradients_of_plain_ones",
    "test_gallery_in_small",
    "test_how_a_step_grows",
    "test_lora_trains_its_adapters_alone_and_they_load",
    "test_neither_depth_nor_drop_path_nor_the_length_of_titles_makes_graphs",
    "test_nothing_is_compiled_while_it_pauses",
    "test_one_flipped_bit_is_refused_and_an_older_checkpoint_proposed",
    "test_the_api_is_two_named_endpoints_and_nothing_of_the_page",
    "test_the_card_finds_the_evaluation_of_its_weights_wherever_it_lies",
    "test_the_loader_reads_it",
    "test_planted_duplicates_are_found_and_nothing_else",
    "test_the_pairs_are_the_same_however_the_photos_are_cut_into_blocks",
    "test_the_readers_of_a_run_last_over_its_epochs",
    "test_the_same_rows_in_the_same_order_over_a_bad_connection",
    "test_the_script_says_photos_and_titles_and_its_files_have_each_photo_once",
    "test_the_weight_is_tuned_on_another_split_stored_and_used",
    "test_trainer_fine_tunes_and_evaluates",
    "test_waits_and_operators_of_a_step_with_an_option",
    "test_waits_and_operators_of_a_step_with_several_negatives_from_all_ranks",
    "test_weight_and_probability_are_tuned_together_and_mistakes_are_told",
    "test_what_a_server_may_do_instead_is_explained",
    "test_what_fails_after_the_work_is_made_up_for_without_doing_it_again",
    "test_what_goes_wrong_in_a_search_is_logged_and_not_told",
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
