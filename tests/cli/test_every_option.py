"""Every option of every verb does what it says: has a test that fails where it is ignored, or says why it needs none.

A new option fails here until a row names its test.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image

from milan_ray import cli
from milan_ray.schema import EXEMPLARS, LEVELS, POOLED
from milan_ray.stages.arithmetic import arithmetic_of
from milan_ray.storage import Storage

TESTS = Path(__file__).resolve().parents[1]
WITNESS = str(TESTS / "plugins/witness.py")
TINY = str(TESTS / "plugins/tiny_models.py")

HERE = "cli/test_every_option.py"
STUDIES = "cli/test_every_option_of_studies.py"
SEGMENTATION = "models/test_segmentation.py"
COMMAND = "cli/test_command_line.py"
TRAIN, LABEL = "stages/test_training_pipeline.py", "stages/test_scores.py"
DND, COLLECT = "stages/test_dnd_pipeline.py", "stages/test_collection_pipeline.py"
ALONE = f"{HERE}::test_options_that_would_do_nothing_are_refused"
WORKERS = f"{HERE}::test_d_options_of_dissections_reach_the_workers"
MORE = "cli/test_every_option_of_training.py"
NAMES = f"{MORE}::test_dry_runs_of_what_is_done_name_what_an_option_changes"
CONTRASTS = "stages/test_contrast.py::test_command_line_describes_with_contrasts_from_nothing"
DESCRIBING = f"{MORE}::test_audits_describe_with_the_options_of_describing"
ONE_LABELER = f"{MORE}::test_scores_and_searches_of_one_labeler_leave_the_others_alone"
FED = f"{MORE}::test_encoder_weights_reach_the_encoder_even_of_a_captioner_that_brings_its_own"
PASTE = f"{MORE}::test_options_of_pasting_are_those_of_its_fingerprint"
BASELINES = "cli/test_dry_runs.py::test_baselines_from_nothing_to_done"
ANALYZE = "studies/test_analyze.py::test_analysis_from_descriptions_to_figure"
EDIT = "studies/test_edit_pipeline.py::test_units_found_by_words_are_removed_step_by_step"
MERGED = "annotations/test_merge.py::test_reference_quirks_of_the_command_line_squash_and_sets_with_images_refuse_them"
CHANGES = f"{HERE}::test_options_change_the_tables_that_they_speak_of"
GPU_BENCHMARK = "benchmarks/test_gpu_benchmark.py::test_gpu_benchmark_without_time_leaves_out_every_part_and_says_so"

VERSIONS_BENCHMARK = "benchmarks/test_description_benchmarks.py::test_versions_short_runs_both_checkouts_in_turns"
SCALE_BENCHMARK = "benchmarks/test_exemplar_benchmarks.py::test_scale_benchmark_counts_the_job_asked_for"

SAMPLED = "stages/test_ratings_pipeline.py::test_options_of_sampling_change_the_draws"

FIT = "cli/test_features_command.py"
FITTED = f"{FIT}::test_options_of_fitting_are_part_of_what_decides"
ASKED = f"{FIT}::test_widths_layers_and_folders_are_those_asked_for"

EFFECTS = "cli/test_effects_command.py"
EFFECTS_DECIDED = f"{EFFECTS}::test_options_of_effects_are_part_of_what_decides"

ROWS: dict[str, str] = {
    **{f"effects --{name}": EFFECTS_DECIDED for name in ("images", "amplify", "classes", "units", "activations")},
    "effects --max-bad": "stages/test_effects_stage.py::test_unreadable_images_are_left_out_up_to_the_share_allowed",
    **{f"annotations collect --{name}": SAMPLED for name in ("clip", "images", "top", "pooling", "seed", "probe")},
    **{f"annotations collect --{name}": SAMPLED for name in ("sampling", "labeler", "units", "actors")},
    "--sampling": SAMPLED,
    "--method": FITTED,
    "--width": FITTED,
    "--layer": ASKED,
    "--rows": FITTED,
    **{f"features fit --{name}": FITTED for name in ("k", "epochs", "seed", "lr", "held-out", "out", "activations")},
    **{f"features fit --{name}": FITTED for name in ("precision", "channels-last", "batch-size")},
    "features fit --name": ASKED,
    "features fit --workers": f"{FIT}::test_what_cannot_be_asked_for_is_one_sentence",
    "features fit --max-bad": f"{FIT}::test_what_cannot_be_asked_for_is_one_sentence",
    "benchmark --images": SCALE_BENCHMARK,
    "benchmark --models": SCALE_BENCHMARK,
    "benchmark --against": VERSIONS_BENCHMARK,
    "benchmark --device": GPU_BENCHMARK,
    "--minutes": GPU_BENCHMARK,
    "benchmark --out": GPU_BENCHMARK,
    "--any": f"{STUDIES}::test_search_takes_one_word_of_several_and_so_many_units",
    "search --top": f"{STUDIES}::test_search_takes_one_word_of_several_and_so_many_units",
    "diff --top": f"{STUDIES}::test_diff_compares_layers_and_prints_so_many",
    "--by-layer": f"{STUDIES}::test_diff_compares_layers_and_prints_so_many",
    "plan --images": "cli/test_plan.py::test_plan_needs_no_images_and_multiplies_models",
    "--speed-up": f"{STUDIES}::test_plan_divides_by_the_speed_up",
    "--photos": f"{STUDIES}::test_benchmarks_read_the_photographs_given_or_refuse_them",
    "annotations import --images": f"{STUDIES}::test_annotations_get_the_images_and_classes_given",
    "annotations merge --images": f"{STUDIES}::test_annotations_get_the_images_and_classes_given",
    "annotations import --labels": f"{STUDIES}::test_annotations_get_the_images_and_classes_given",
    "annotations merge --labels": f"{STUDIES}::test_annotations_get_the_images_and_classes_given",
    "annotations clean --keep-rejected": f"{STUDIES}::test_cleaning_keeps_what_was_rejected",
    "annotations answers --keep-rejected": f"{COLLECT}::test_answers_of_mturk_become_annotations",
    "--url": f"{COLLECT}::test_tasks_show_each_units_exemplars_darkened_outside_the_masks",
    "score --images": f"{STUDIES}::test_scores_are_as_the_options_say",
    "score --prompt": f"{STUDIES}::test_scores_are_as_the_options_say",
    "score --generator": f"{STUDIES}::test_scores_are_as_the_options_say",
    "score --top": f"{STUDIES}::test_scores_are_as_the_options_say",
    "--retrieved": f"{STUDIES}::test_scores_are_as_the_options_say",
    "--sigmoid": f"{STUDIES}::test_scores_are_as_the_options_say",
    "--sanity": f"{STUDIES}::test_scores_are_as_the_options_say",
    "audit --supported-by": "studies/test_supported.py::test_audit_counts_supported_descriptions_alone",
    "--supported-by": "studies/test_supported.py::test_command_line_hands_the_judge_on",
    "--verdicts-by": "scoring/test_search_command.py::test_search_shows_supported_descriptions_first",
    "--calibrate": "stages/test_verdicts.py::test_calibration_learns_from_known_concepts_and_untrained_networks_alone",
    "--grid": f"{STUDIES}::test_labels_come_from_the_grid_and_the_legend_given",
    "label --legend": f"{STUDIES}::test_labels_come_from_the_grid_and_the_legend_given",
    "--segmentation": f"{SEGMENTATION}::test_a_network_is_found_in_the_models_folder_or_missed_with_one_sentence",
    "exemplars --labels": f"{STUDIES}::test_exemplars_keep_the_classes_of_the_labels_given",
    "--labels": "cli/test_every_dry_run.py::test_every_verb_reads_the_labels_and_the_legend_given",
    "baselines --legend": "cli/test_every_dry_run.py::test_every_verb_reads_the_labels_and_the_legend_given",
    "--most": "studies/test_edit_pipeline.py::test_units_found_by_words_are_removed_step_by_step",
    "--each": "cli/test_dry_runs.py::test_paste_says_what_is_missing",
    "--originals": "cli/test_dry_runs.py::test_paste_says_what_is_missing",
    "--distractors": "cli/test_dry_runs.py::test_paste_says_what_is_missing",
    "demo --photos": "showcase/test_photographs.py::test_plan_is_of_the_real_network_over_the_folder",
    "demo --superposed": "cli/test_dry_runs.py::test_demo_begins_with_its_networks",
    "demo --generator": "cli/test_dry_runs.py::test_demo_begins_with_its_networks",
    "dnd --generator": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "dnd --top": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "--crops": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "--drawn": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "dnd --prompt": f"{STUDIES}::test_dissection_asks_language_model_and_generator_as_told",
    "--llm-model": f"{STUDIES}::test_dissection_asks_language_model_and_generator_as_told",
    "--llm-temperature": f"{STUDIES}::test_dissection_asks_language_model_and_generator_as_told",
    "--llm-prices": f"{STUDIES}::test_dissection_asks_language_model_and_generator_as_told",
    "--llm-budget": f"{STUDIES}::test_dissection_asks_language_model_and_generator_as_told",
    "--llm-per-minute": f"{STUDIES}::test_dissection_asks_language_model_and_generator_as_told",
    "--precision": WORKERS,
    "--channels-last": WORKERS,
    "--batch-size": WORKERS,
    "--cpus-per-actor": WORKERS,
    "--k": CHANGES,
    "--quantile": CHANGES,
    "--activations": CHANGES,
    "--weights": CHANGES,
    "--layers": CHANGES,
    "--features": f"{HERE}::test_features_of_files_are_dissected_beside_or_in_place_of_layers",
    "--pooled": CHANGES,
    "--max-bad": CHANGES,
    "--device": CHANGES,
    "--model": f"{COMMAND}::test_options_of_a_file_are_those_of_the_command_line",
    "--zoo": f"{COMMAND}::test_options_of_a_file_are_those_of_the_command_line",
    "--config": f"{COMMAND}::test_options_of_a_file_are_those_of_the_command_line",
    "--json": f"{COMMAND}::test_a_plan_is_text_or_json",
    "--quiet": f"{COMMAND}::test_a_plan_is_text_or_json",
    "--log": "test_progress.py::test_log_as_json_says_errors_too_and_shows_no_bar_in_a_terminal",
    "--debug": "test_cli.py::test_debug_shows_the_traceback",
    "--dry-run": "cli/test_every_dry_run.py::test_dry_runs_of_every_verb_connect_to_nothing_and_write_nothing",
    "--download": "cli/test_every_dry_run.py::test_dry_runs_say_what_would_be_fetched",
    "--milan": "cli/test_every_dry_run.py::test_dry_runs_say_what_would_be_fetched",
    "--storage": CHANGES,
    "--plugin": CHANGES,
    "--probe": CHANGES,
    "--report": "stages/test_describe_pipeline.py::test_report_of_a_model_without_descriptions_beside_one_with",
    "--no-report": CHANGES,
    "--units": "stages/test_staleness.py::test_units_alone_are_described_and_do_not_pass_for_the_whole_layer",
    "--lam": "stages/test_staleness.py::test_run_makes_again_what_the_dry_run_named_and_nothing_else",
    "--setting": f"{TRAIN}::test_train_command_takes_a_tuned_setting",
    "--groups": f"{TRAIN}::test_train_command_all_groups_of_the_world_are_fourteen_captioners",
    "--annotations": f"{COLLECT}::test_answers_of_mturk_become_annotations",
    "--tables": f"{COLLECT}::test_answers_of_mturk_become_annotations",
    "--source": f"{COLLECT}::test_answers_of_mturk_become_annotations",
    "--rouge": f"{COLLECT}::test_statistics_of_stored_annotations_and_of_a_file",
    "--language": f"{COLLECT}::test_statistics_of_stored_annotations_and_of_a_file",
    "--key": f"{COLLECT}::test_answers_of_label_studio_become_the_same_annotations",
    "--qualification": f"{COLLECT}::test_answers_of_label_studio_become_the_same_annotations",
    "--concepts": f"{LABEL}::test_units_are_named_and_a_dry_run_finds_them_done",
    "--similarity": f"{LABEL}::test_units_are_named_and_a_dry_run_finds_them_done",
    "--class-names": f"{LABEL}::test_command_line_says_what_is_up_to_date_and_what_is_missing",
    "--captioner": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "--llm": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "--scoring": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "--tag": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "--pair": "studies/test_audit.py::test_audit_of_other_words_pairs_and_networks",
    "--words": "studies/test_audit.py::test_audit_of_other_words_pairs_and_networks",
    "--suffix": "studies/test_audit.py::test_audit_refuses_what_it_cannot_compare",
    "--query": "studies/test_audit.py::test_audit_counts_reviews_and_counts_again",
    "--semantic": "scoring/test_search_command.py::test_search_by_meaning_takes_the_model_at_hand",
    "--parquet": "scoring/test_search_command.py::test_search_prints_a_table_or_json_or_writes_parquet",
    "--remove": "studies/test_edit_pipeline.py::test_units_found_by_words_are_removed_step_by_step",
    "--fine-tune": "studies/test_edit_pipeline.py::test_units_found_by_words_are_removed_step_by_step",
    "--out": "studies/test_edit_pipeline.py::test_units_found_by_words_are_removed_step_by_step",
    "--test": "studies/test_edit_pipeline.py::test_units_found_by_words_are_removed_step_by_step",
    "--small": "cli/test_dry_runs.py::test_paper_stands_on_the_demo_and_finds_its_claims_anew",
    "--only": "cli/test_dry_runs.py::test_paper_stands_on_the_demo_and_finds_its_claims_anew",
    "--split": "cli/test_dry_runs.py::test_generalize_knows_its_units_when_encodings_are_there",
    "--encoder": "cli/test_dry_runs.py::test_generalize_knows_its_units_when_encodings_are_there",
    "--copies": "cli/test_plan.py::test_plan_needs_no_images_and_multiplies_models",
    "--price": "cli/test_plan.py::test_plan_needs_no_images_and_multiplies_models",
    "--sample": "cli/test_plan.py::test_plan_needs_no_images_and_multiplies_models",
    "--short": "benchmarks/test_exemplar_benchmarks.py::test_benchmark_short_form_writes_its_figures",
    "--units-axis": f"{HERE}::test_options_say_how_layers_are_read",
    "--batch-axis": f"{HERE}::test_options_say_how_layers_are_read",
    "--layer-grid": f"{HERE}::test_options_say_how_layers_are_read",
    "--prefix-tokens": f"{HERE}::test_options_say_how_layers_are_read",
    "--image-column": "stages/test_any_probe.py::test_options_image_column_and_label_column_choose",
    "--label-column": "stages/test_any_probe.py::test_options_image_column_and_label_column_choose",
    "--verify": "faults/test_damaged_tables.py::test_status_lists_what_is_damaged_and_goes_on",
    "--conformance": f"{HERE}::test_conformance_of_chosen_families_is_written",
    "--families": f"{HERE}::test_conformance_of_chosen_families_is_written",
    "--side": f"{HERE}::test_conformance_of_chosen_families_is_written",
    "--earlier": f"{HERE}::test_conformance_of_chosen_families_is_written",
    "--library": f"{HERE}::test_conformance_of_chosen_families_is_written",
    "models --out": f"{HERE}::test_conformance_of_chosen_families_is_written",
    "--repeats": "benchmarks/test_exemplar_benchmarks.py::test_benchmark_short_form_writes_its_figures",
    "--annotation-count": "stages/test_published_sets.py::test_annotation_count_chooses_units_and_annotations",
    "--address": f"{MORE}::test_address_is_where_ray_is_looked_for",
    "plan --address": f"{HERE}::test_options_that_would_do_nothing_are_refused",
    "--beam-size": NAMES,
    "baselines --beam-size": BASELINES,
    "audit --beam-size": DESCRIBING,
    "--bert-model": f"{MORE}::test_language_model_of_tuning_is_part_of_what_decides",
    "--bertscore": NAMES,
    "annotations answers --bertscore": f"{COLLECT}::test_answers_of_mturk_become_annotations",
    "annotations statistics --bertscore": f"{MORE}::test_agreement_takes_the_language_model_asked_for",
    "baselines --bertscore": BASELINES,
    "--bf16": NAMES,
    "--contrast": CONTRASTS,
    "--mu": CONTRASTS,
    "--clip-gamma": "stages/test_contrast.py::test_reranking_sets_exemplars_against_contrasts",
    "label --mu": f"{LABEL}::test_contrasts_are_asked_for_by_mu",
    "--contrasts": CONTRASTS,
    "--random-contrasts": CONTRASTS,
    "--contrast-quantile": CONTRASTS,
    "--contrast-masks": CONTRASTS,
    "--clip": NAMES,
    "dnd --clip": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "demo --clip": "cli/test_dry_runs.py::test_demo_begins_with_its_networks",
    "audit --clip": DESCRIBING,
    "--clip-beam-size": NAMES,
    "audit --clip-beam-size": DESCRIBING,
    "--clip-lam": NAMES,
    "audit --clip-lam": DESCRIBING,
    "--clip-z": NAMES,
    "audit --clip-z": DESCRIBING,
    "--decoder": FED,
    "--encoder-weights": FED,
    "--epochs": NAMES,
    "--formula-beam-size": BASELINES,
    "--formula-length": BASELINES,
    "--held-out": NAMES,
    "--hidden": NAMES,
    "--hold-out": NAMES,
    "--labeler": NAMES,
    "label --labeler": BASELINES,
    "score --labeler": ONE_LABELER,
    "search --labeler": ONE_LABELER,
    "diff --labeler": ONE_LABELER,
    "analyze --labeler": ANALYZE,
    "edit --labeler": EDIT,
    "paste --labeler": PASTE,
    "--length": NAMES,
    "baselines --length": BASELINES,
    "audit --length": DESCRIBING,
    "--lr": EDIT,
    "--name": NAMES,
    "train --name": f"{TRAIN}::test_train_command_plans_a_captioner_per_group_and_refuses_what_is_not_clear",
    "baselines --name": BASELINES,
    "--patience": NAMES,
    "--pool": PASTE,
    "--pooling": NAMES,
    "dnd --pooling": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "--reference-quirks": NAMES,
    "exemplars --reference-quirks": DESCRIBING,
    "annotations import --reference-quirks": MERGED,
    "annotations merge --reference-quirks": MERGED,
    "dnd --reference-quirks": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "baselines --reference-quirks": BASELINES,
    "audit --reference-quirks": DESCRIBING,
    "--seed": NAMES,
    "dnd --seed": f"{DND}::test_command_line_plans_and_says_what_is_missing",
    "analyze --seed": ANALYZE,
    "edit --seed": EDIT,
    "paste --seed": PASTE,
    "--share": NAMES,
    "--within-patience": NAMES,
    "--trials": NAMES,
    "analyze --trials": ANALYZE,
    "edit --trials": EDIT,
    "--stop-by": NAMES,
    "--ties": ANALYZE,
    "--workers": f"{MORE}::test_more_training_workers_than_there_is_room_for_are_refused",
    "--threads": "benchmarks/test_exemplar_benchmarks.py::test_benchmark_short_form_writes_its_figures",
    "--no-ray": "cli/test_doctor.py::test_doctor_says_of_everything_missing_what_works_without_it_and_how_to_get_it",
    "--embedding": NAMES,
}
"""Option → the test that fails where it is ignored, below ``tests``; ``VERB --option`` comes before ``--option``."""

CANNOT_MATTER = {
    "--actors": "how many never changes a result: tests/stages/test_exemplars_pipeline.py compares one with two",
    "--shard-size": "how large never changes a result: tests/stages/test_exemplars_pipeline.py compares three",
    "--gpus-per-actor": "there is no GPU where the tests run",
    "--memory-limit": "the same batches come from memory and from disk",
    "dnd --pooled": "always on there",
}


def verbs(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, below in action.choices.items():
                yield from verbs(below, f"{name} {verb}".strip())
            return
    yield name, parser


def every_option() -> list[tuple[str, str]]:
    return [
        (verb, action.option_strings[-1])
        for verb, parser in verbs(cli.build_parser())
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    ]


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("verb", [verb for verb, _ in verbs(cli.build_parser())])
def test_every_option_has_a_test_that_fails_where_it_is_ignored(verb: str) -> None:
    for option in (option for name, option in every_option() if name == verb):
        rows = [f"{verb} {option}", option]
        found = next((table[row] for row in rows for table in (ROWS, CANNOT_MATTER) if row in table), None)
        assert found is not None, f"{verb} {option} has no row: name its test in ROWS"
        if found is not None and "::" in found:
            file, test = found.split("::")
            assert test in names_in(file), found


def test_rows_speak_of_options_that_there_are() -> None:
    known = {name for verb, option in every_option() for name in (option, f"{verb} {option}")}
    assert {*ROWS, *CANNOT_MATTER} <= known


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def dissect(root: Path, few: Path, *options: str, plugin: str = TINY, model: str = "tiny/cnn") -> Storage:
    command = ["exemplars", "--model", model, "--plugin", plugin, "--probe", str(few), "--storage", str(root)]
    assert cli.main([*command, "--no-report", *options]) == 0
    return Storage(root)


@pytest.mark.parametrize(
    ("options", "says", "images"),
    [
        ([], [32, 0, 1], 16),
        (["--precision", "bfloat16"], [16, 0, 1], 16),
        (["--precision", "float16", "--batch-size", "7"], [17, 0, 1], 7),
        (["--channels-last", "--cpus-per-actor", "2"], [32, 1, 2], 16),
    ],
)
def test_d_options_of_dissections_reach_the_workers(few, tmp_path, monkeypatch, options, says, images) -> None:
    passes = tmp_path / "passes"
    monkeypatch.setenv("MILAN_WITNESS_PASSES", str(passes))
    storage = dissect(tmp_path, few, "--pooled", *options, plugin=WITNESS, model="witness")
    keys = {"model": "witness", "layer": "says"}
    found = storage.read(POOLED, ["max"], **keys)["max"].to_pylist()
    assert np.max(found, axis=0)[:-1].tolist() == says
    first = storage.read(EXEMPLARS, ["unit", "activation"], **keys).to_pydict()
    told = dict(zip(first["unit"], first["activation"], strict=True))
    assert [told[unit] for unit in range(len(says))] == says
    how = arithmetic_of(storage, keys["model"], keys["layer"])
    assert (how.precision == "float32", how.channels_last) == (says[0] == 32, says[1] == 1)
    assert max(map(int, passes.read_text().split())) == images


def test_options_change_the_tables_that_they_speak_of(few, tmp_path, capsys) -> None:
    plain = dissect(tmp_path / "plain", few)
    keys = {"model": "tiny/cnn", "layer": "0"}
    table = plain.read(EXEMPLARS, **keys)
    assert sorted(k["layer"] for k in plain.partitions(EXEMPLARS)) == ["0", "2", "6"]
    assert not plain.partitions(POOLED) and not (tmp_path / "plain/report").exists()
    own = dissect(tmp_path / "own", few, "--layers", "0", "--k", "3", "--pooled", "--activations", "post")
    assert [k["layer"] for k in own.partitions(EXEMPLARS)] == ["0"] and own.count(POOLED, **keys) == 20
    assert own.count(EXEMPLARS, **keys) == 6 * 3 and len(table) == 6 * 15
    post = own.read(EXEMPLARS, ["activation"], **keys)["activation"].to_numpy()
    assert post.min() >= 0
    low = dissect(tmp_path / "low", few, "--layers", "0", "--quantile", "0.5", "--weights", "random")
    assert (low.read(LEVELS, **keys)["level"].to_numpy() < plain.read(LEVELS, **keys)["level"].to_numpy()).all()
    (few / "zz.png").write_bytes(b"no image")
    command = ["exemplars", "--model", "tiny/cnn", "--plugin", TINY, "--storage", str(tmp_path / "bad")]
    try:
        assert cli.main([*command, "--probe", str(few), "--no-report", "--max-bad", "0.01"]) == 1
        assert cli.main([*command, "--probe", str(few), "--no-report", "--max-bad", "0.2"]) == 0
        assert cli.main([*command, "--probe", str(few), "--no-report", "--device", "cuda:9", "--k", "2"]) == 1
    finally:
        (few / "zz.png").unlink()


def test_features_of_files_are_dissected_beside_or_in_place_of_layers(few, tmp_path, capsys) -> None:
    np.save(tmp_path / "axes.npy", np.eye(6)[:4])
    np.save(tmp_path / "square.npy", np.eye(6))
    (tmp_path / "said.yaml").write_text("file: square.npy\nlayer: '0'\nname: all\ntransposed: true\n")
    plain = dissect(tmp_path / "plain", few, "--layers", "0", "--features", f"0={tmp_path}/axes.npy")
    assert sorted(k["layer"] for k in plain.partitions(EXEMPLARS)) == ["0", "0#axes"]
    units, axes = (plain.read(EXEMPLARS, model="tiny/cnn", layer=layer) for layer in ("0", "0#axes"))
    few_units = units.filter(pc.less(units["unit"], 4))
    assert few_units.drop_columns(["layer", "mask"]).equals(axes.drop_columns(["layer", "mask"]))
    alone = dissect(tmp_path / "alone", few, "--features", str(tmp_path / "said.yaml"))
    assert [k["layer"] for k in alone.partitions(EXEMPLARS)] == ["0#all"]
    command = ["exemplars", "--plugin", TINY, "--probe", str(few), "--storage", str(tmp_path / "bad")]
    one = [*command, "--model", "tiny/cnn", "--features"]
    assert cli.main([*one, str(tmp_path / "axes.npy")]) == 1
    assert cli.main([*one, f"2={tmp_path}/axes.npy"]) == 1
    assert cli.main([*one, f"0={tmp_path}/square.npy"]) == 1
    assert cli.main([*one, f"0={tmp_path}/nothing.npy"]) == 1
    assert cli.main([*command, "--model", "tiny/*", "--features", f"0={tmp_path}/axes.npy"]) == 1
    said = capsys.readouterr().err
    for sentence in (
        "which layer? Give --features LAYER=",
        "were made for a layer of 6 units, and '2' of tiny/cnn has 8",
        "which side of their 6 × 6 matrix is the layer's",
        "no features at",
        "--features names features of one model",
    ):
        assert sentence in said


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--units-axis", "9"], "units_axis=9"),
        (["--batch-axis", "1"], "batch_axis=1"),
        (["--layer-grid", "3x5"], "grid=(3, 5)"),
        (["--prefix-tokens", "2"], "prefix_tokens=2"),
    ],
)
def test_options_say_how_layers_are_read(few, tmp_path, capsys, option, sentence) -> None:
    command = ["exemplars", "--model", "tiny/cnn", "--plugin", TINY, "--probe", str(few), "--storage", str(tmp_path)]
    assert cli.main([*command, "--layers", "0", *option]) == 1
    assert sentence in capsys.readouterr().err


def test_conformance_of_chosen_families_is_written(tmp_path, capsys) -> None:
    pytest.importorskip("timm")
    command = ["models", "--conformance", "--library", "torchvision", "--families", "mnasnet*"]
    assert cli.main([*command, "--side", "64", "--json", "--out", str(tmp_path / "page.md")]) == 0
    page, rows = (tmp_path / "page.md").read_text(), capsys.readouterr().out
    assert "| mnasnet | `mnasnet0_5` | 64×64 |" in page and "resnet" not in page and "timm/" not in page
    (tmp_path / "rows").write_text(rows.replace("64, 64", "63, 65"))
    assert cli.main([*command, "--earlier", str(tmp_path / "rows"), "--out", str(tmp_path / "page.md")]) == 0
    assert "63×65" in (tmp_path / "page.md").read_text()  # what was said earlier, and not run again


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["describe", "--model", "m", "--decoder", "d", "--quantile", ".98", "--k", "15"], "--quantile, --k|--k, --q"),
        (["describe", "--model", "m", "--decoder", "d", "--probe", "p", "--clip-z", "1"], "without --clip --clip-z"),
        (["describe", "--model", "m", "--decoder", "d", "--contrast", "c"], "without --probe"),
        (["describe", "--model", "m", "--decoder", "d", "--probe", "p", "--mu", "1"], "without --contrast --mu"),
        (["audit", "--mu", ".1"], "described already, --mu would do nothing"),
        (["label", "--model", "m", "--probe", "p", "--concepts", "c"], "clip-dissect --concepts would do nothing"),
        (["label", "--model", "m", "--probe", "p", "--labeler", "netdissect", "--formula-length", "2"], "compexp"),
        (["label", "--model", "m", "--probe", "p", "--labeler", "clip-dissect", "--grid", "2"], "--grid would do"),
        (["dnd", "--model", "m", "--probe", "p", "--llm", "frequent", "--llm-model", "x"], "--llm-model would do"),
        (["dnd", "--model", "m", "--probe", "p", "--llm", "https://h/v1", "--llm-budget", "1"], "--llm-prices"),
        (["score", "--model", "m", "--probe", "p", "--clip", "c", "--images", "2"], "without --generator --images"),
        (["score", "--model", "m", "--probe", "p", "--generator", "g", "--top", ".1"], "without --clip --top"),
        (["audit", "--semantic"], "without --query"),
        (["audit", "--k", "3"], "described already, --k would do nothing"),
        (["search", "red", "--json", "--parquet", "f"], "--json would do nothing"),
        (["diff", "a", "b", "--json", "--top", "3"], "--top would do nothing"),
        (["models", "--weights", "w"], "--weights would do nothing"),
        (["edit", "--model", "m", "--probe", "p", "--lr", ".1"], "without --fine-tune"),
        (["compare", "--report", "x", "--no-report"], "with --no-report --report would do nothing"),
        (["annotations", "import", "a.csv", "--model", "m", "--download"], "--download would do nothing"),
    ],
)
def test_options_that_would_do_nothing_are_refused(command, sentence, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "leave" in said and any(part in said for part in sentence.split("|")), said
    assert not list(tmp_path.iterdir())


def test_labels_without_concept_maps_are_refused_before_exemplars(few, tmp_path, capsys) -> None:
    command = ["label", "--model", "tiny/cnn", "--plugin", TINY, "--probe", str(few), "--storage", str(tmp_path)]
    assert cli.main(command) == 1
    assert "has no concept maps" in capsys.readouterr().err and not Storage(tmp_path).partitions(EXEMPLARS)


def test_describe_and_dissect_without_generator_is_refused_before_exemplars(few, tmp_path, capsys) -> None:
    command = ["dnd", "--model", "tiny/cnn", "--plugin", TINY, "--probe", str(few), "--storage", str(tmp_path)]
    assert cli.main([*command, "--llm", "frequent", "--captioner", "absent", "--scoring", "mean"]) == 1
    assert "absent" in capsys.readouterr().err and not Storage(tmp_path).partitions(EXEMPLARS)
