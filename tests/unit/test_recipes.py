"""Is every answer of a recipe checked, alone and together with the others, and is none ignored in silence?"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dtrain.assemble import assemble
from dtrain.config import dump_job, parse_job
from dtrain.launch.checks import How, check_answers
from dtrain.launch.run_folder import resolved
from dtrain.methods import RULES
from dtrain.plan.write import answers as answers_written
from dtrain.recipe_fits import check_ranks, check_values
from dtrain.recipes import AXES, DEFAULT_RECIPE, RECIPES, Recipe, answer_of, of_join, of_section, resolve, with_steps
from dtrain.sections_sync import Sync

TRAIN = [name for name, row in RECIPES.items() if RULES[row.algorithm].simulated is None]


@pytest.mark.parametrize("name", TRAIN)
def test_every_row_fits_together_and_becomes_code(name: str) -> None:
    for num_islands in (2, 3, 16):
        recipe = resolve(name, {}, num_islands)
        assert recipe == RECIPES[name]
        plan = assemble(with_steps(recipe, 100), seed=0, num_islands=num_islands)
        assert plan.sends == (name not in ("local", "allreduce", "demo"))
        assert plan.rewrites_gradients == (name in ("allreduce", "gradient_tracking", "beer", "demo"))


def test_what_is_only_simulated_trains_no_model() -> None:
    assert set(RECIPES) - set(TRAIN) == {"dadao"}
    with pytest.raises(ValueError, match=r'"dadao" is for strongly convex problems .* to train a model use another'):
        assemble(resolve("dadao", {}, 4), seed=0, num_islands=4)


def test_the_recipes_that_are_promised_are_there() -> None:
    assert {"allreduce", "local", "fedavg", "diloco", "dpsgd", "choco", DEFAULT_RECIPE} <= set(RECIPES)
    assert RECIPES["allreduce"].codec == "identity"
    assert RECIPES["allreduce"].every == 1


def test_nothing_said_is_the_default_recipe() -> None:
    assert resolve(None, {}, 2).name == DEFAULT_RECIPE
    assert of_section({}, 2) == RECIPES[DEFAULT_RECIPE]
    assert of_section({"recipe": "diloco", "every": 7}, 2).every == 7


@pytest.mark.parametrize("name", RECIPES)
def test_a_row_written_out_whole_is_the_row(name: str) -> None:
    """A run's job.toml holds every answer; none of them may be taken for one that has no effect."""
    row = RECIPES[name]
    assert resolve(name, {axis: getattr(row, axis) for axis in AXES}, 4) == row


ADAPTS: dict[str, object] = {"rank": "adaptive:32", "every": "adaptive:50"}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dilco", {}, "recipe 'dilco' is not known (did you mean diloco?); use one of"),
        ("diloco", {"topology": "rign"}, "topology = 'rign' is not known; use one of complete, ring"),
        ("diloco", {"reduce": "ring"}, "reduce = 'ring' is not known"),
        ("diloco", {"outer": "adam"}, "outer = 'adam' is not known; use one of copy, sgd, nesterov, delayed_nesterov"),
        ("diloco", {"landing": "late"}, "landing = 'late' is not known; use one of keep, eager, pure, blend"),
        ("diloco", {"codec": "int3"}, "codec 'int3' is not known"),
        ("diloco", {"every": 0}, "every = 0 is not allowed; use 1 or more"),
        ("diloco", {"fragments": 0}, "fragments = 0 is not allowed"),
        ("diloco", {"delay": -1}, "delay = -1 is not allowed"),
        ("diloco", {"delay": "late"}, "delay = 'late' is not allowed"),
        ("diloco", {"outer_lr": 0.0}, "outer_lr = 0.0 is not allowed; use a number above 0"),
        ("diloco", {"outer_momentum": 1.0}, "outer_momentum = 1.0 is not allowed"),
        ("choco", {"gamma": 1.5}, "gamma = 1.5 is not allowed"),
        ("diloco", {"bucket_bytes": 0}, "bucket_bytes = 0 is not allowed"),
        ("diloco", {"delay": 101}, "sync.delay = 101 is longer than sync.every = 100"),
        ("diloco", {"reduce": "neighbours"}, 'sync.reduce = "neighbours" does not fit sync.algorithm = "diloco"'),
        ("choco", {"reduce": "gather"}, 'sync.reduce = "gather" does not fit sync.algorithm = "choco"'),
        ("diloco", {"topology": "ring"}, 'sync.topology = "ring" has no effect with sync.reduce = "all_to_all"'),
        ("a2cid2", {"topology": "ring"}, 'the rounds of a2cid2 are meetings of two; sync.topology = "ring" has'),
        ("choco", {"topology": "random_pairs"}, "choco keeps sums of its neighbours' public copies"),
        ("diloco", {"landing": "eager"}, 'sync.landing = "eager" is for algorithm = "diloco" with a delay'),
        ("diloco", {"landing": "pure"}, 'sync.landing = "pure" is for algorithm = "diloco" with a delay'),
        ("diloco", {"landing": "blend", "alpha": 1.5}, "alpha = 1.5 is not allowed; use 0 or more and less than 1"),
        ("diloco", {"landing": "blend", "alpha": 1.0}, "alpha = 1.0 is not allowed; use 0 or more and less than 1"),
        ("diloco", {"landing": "blend", "alpha": -0.1}, "alpha = -0.1 is not allowed; use 0 or more and less than 1"),
        ("diloco", {"landing": "blend", "alpha": math.nan}, "alpha = nan is not allowed; use 0 or more and less than 1"),
        ("diloco", {"alpha": 0.25}, 'sync.alpha = 0.25 has no effect with sync.landing = "keep"'),
        ("dpsgd", {"alpha": 0.25}, 'sync.alpha = 0.25 has no effect with sync.algorithm = "dpsgd"'),
        ("diloco", {"landing": "blend", "fragments": 7}, "sync.fragments = 7 does not divide sync.every = 100, and with"),
        ("diloco", {"landing": "blend", "fragments": 7}, "use fragments = 5, or every = 105"),
        ("diloco", {"landing": "blend", "fragments": 4, "delay": 25}, "sync.delay = 25 is not below every / fragments = 25, and"),
        ("diloco", {"landing": "blend", "fragments": 4, "delay": 25}, 'use at most 24, or landing = "keep"'),
        ("diloco", {"landing": "blend", "delay": "round"}, "sync.delay = 100 is not below every / fragments = 100, and"),
        ("diloco", {"landing": "blend", "fragments": 2, "schedule": "budget:9"}, "use schedule = \"every\", or fragments = 1"),
        ("diloco", {"landing": "eager", "delay": 1, "algorithm": "dpsgd"}, 'sync.landing = \'eager\' has no effect with'),
        ("diloco", {"outer_lr": math.inf}, "outer_lr = inf is not allowed; use a number above 0"),
        ("allreduce", {"every": 2}, "allreduce averages gradients each step"),
        ("demo", {"delay": 1}, "demo averages gradients each step before the update; every = 1, delay = 0"),
        ("diloco", {"fragments": 101}, "sync.fragments = 101 cannot take turns within sync.every = 100"),
        ("dpsgd", {"gamma": 0.5}, 'sync.gamma = 0.5 has no effect with sync.algorithm = "dpsgd"'),
        ("dpsgd", {"outer_lr": 0.5}, 'sync.outer_lr = 0.5 has no effect with sync.algorithm = "dpsgd"'),
        ("dpsgd", {"outer_state": "host"}, "sync.outer_state = 'host' has no effect with sync.algorithm ="),
        ("diloco", {"outer_state": "disk"}, "outer_state = 'disk' is not known; use one of device, host"),
        ("fedavg", {"outer_lr": 0.5}, 'sync.outer_lr = 0.5 has no effect with sync.outer = "copy"'),
        ("diloco", {"outer": "sgd", "outer_momentum": 0.5}, 'sync.outer_momentum = 0.5 has no effect with sync.outer = "sgd"'),
        ("delayed_diloco", {"feedback_decay": 0.0}, "feedback_decay = 0.0 is not allowed; use more than 0 and at most 1"),
        ("delayed_diloco", {"feedback_decay": 1.01}, "feedback_decay = 1.01 is not allowed"),
        ("diloco", {"feedback_decay": 0.9}, "sync.feedback_decay = 0.9 has no effect with sync.error_feedback = false"),
        ("dpsgd", {"feedback_decay": 0.9}, 'sync.feedback_decay = 0.9 has no effect with sync.algorithm = "dpsgd"'),
        ("dpsgd", {"schedule": "late"}, "schedule = 'late' is not known; use \"every\", or \"budget:R\""),
        ("dpsgd", {"schedule": 3}, "schedule = 3 is not allowed"),
        ("dpsgd", {"schedule": "budget:9", "every": 5}, 'sync.every = 5 has no effect with sync.schedule = "budget:9"'),
        ("dpsgd", {"schedule": "budget:9", "delay": "round"}, 'sync.delay = "round" is as long as a period'),
        ("a2cid2", {"schedule": "budget:9"}, 'equally far apart, and sync.schedule = "budget:9" has others; use "every"'),
        ("allreduce", {"schedule": "budget:9"}, 'sync.schedule = "every" is all it can do'),
        ("local", {"schedule": "budget:9"}, 'sync.schedule = \'budget:9\' has no effect with sync.algorithm = "local"'),
        ("dpsgd", {"schedule": "ready"}, '"ready" is for meetings of two, and sync.algorithm = "dpsgd" has rounds of all'),
        ("choco", {"schedule": "ready"}, '"ready" is for meetings of two, and sync.algorithm = "choco" has rounds of all'),
        ("local", {"schedule": "ready"}, 'sync.schedule = \'ready\' has no effect with sync.algorithm = "local"'),
        ("a2cid2", {"schedule": "ready", "delay": 3, "every": 3}, 'sync.delay = 3 has no effect with sync.schedule = "ready"'),
        ("a2cid2", {"schedule": "ready", "fragments": 2}, "sync.fragments = 2 cannot take turns with sync.schedule"),
        ("diloco", {"rank": 4}, 'sync.rank = 4 has no effect with sync.reduce = "all_to_all"'),
        ("dpsgd", {"rank": 4}, 'sync.rank = 4 has no effect with sync.algorithm = "dpsgd"'),
        ("diloco", {"reduce": "low_rank"}, 'sync.reduce = "low_rank" needs a rank: set sync.rank, 32 say'),
        ("fedavg", {"reduce": "low_rank", "rank": True}, "rank = True is not allowed; use 1 or more"),
        ("dilocox", {"rank": 0}, 'rank = 0 is not allowed; use 1 or more, or "adaptive:32"'),
        ("dilocox", {"rank": "adaptive"}, "rank = 'adaptive' is not known; use 1 or more, or"),
        ("dilocox", {"rank": "adaptive:0"}, "rank = 'adaptive:0' is not known; use 1 or more, or"),
        ("dilocox", {"every": "adaptive"}, "every = 'adaptive' is not known; use 1 or more, or"),
        ("dilocox", {"every": "adaptive:0"}, "every = 'adaptive:0' is not known; use 1 or more, or"),
        ("dilocox", {"every": "adaptive:50"}, "with a rank that adapts; use sync.rank=adaptive:32, or sync.every = 50"),
        ("diloco", {"every": "adaptive:50"}, "a rank that adapts; use sync.recipe=dilocox sync.rank=adaptive:32, or sync."),
        ("dilocox", {**ADAPTS, "fragments": 2}, "sync.every = \"adaptive:50\" is one period for the whole model, and sync.fragm"),
        ("dilocox", {**ADAPTS, "delay": 50}, "sync.delay = 50 leaves sync.every = \"adaptive:50\" no step to fall by, as a"),
        # Stable while H is 50, and not where it has fallen to 46.
        ("dilocox", {**ADAPTS, "delay": 45, "landing": "keep", "outer_lr": 1.4}, "sync.outer_momentum = 0.6 is not stable with"),
        ("dpsgd", {"reduce": "low_rank"}, 'sync.reduce = "low_rank" does not fit sync.algorithm = "dpsgd"'),
        ("dilocox", {"topology": "ring"}, 'sync.topology = "ring" has no effect with sync.reduce = "low_rank"'),
        ("local", {"codec": "int8"}, 'sync.codec = \'int8\' has no effect with sync.algorithm = "local"'),
    ],
)
def test_what_does_not_fit_is_one_line(name: str, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        resolve(name, changes, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rho", [0.0, math.inf, math.nan])
def test_a_row_whose_sam_climbs_nowhere_or_out_of_sight_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=rf"^sam_rho = {rho} is not allowed; use a number above 0$"):
        check_values(replace(RECIPES["dfedsam"], sam_rho=rho), {})


@pytest.mark.parametrize("topology", ["ring", "one_peer_exponential", "random_pairs"])
def test_gossip_needs_two_islands(topology: str) -> None:
    assert resolve("dpsgd", {"topology": topology}, 2).topology == topology
    with pytest.raises(ValueError, match=f'sync.topology = "{topology}" needs at least 2 islands, got 1'):
        resolve("dpsgd", {"topology": topology}, 1)


def test_pairs_may_meet_when_both_are_ready_and_then_no_length_is_asked_for() -> None:
    recipe = resolve("a2cid2", {"schedule": "ready", "every": 2}, 4)
    assert with_steps(recipe, None) == of_join(recipe, None) == recipe
    with pytest.raises(ValueError, match=r'^total_steps = 9 has no effect with sync.schedule = "ready"; leave it out'):
        of_join(recipe, 9)
    check_ranks(recipe, 1)
    check_ranks(RECIPES["a2cid2"], 2)
    with pytest.raises(ValueError, match=r'^islands.ranks = 2: with sync.schedule = "ready" .* use islands.ranks=1,') as caught:
        check_ranks(recipe, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "changes", "said"),
    [
        ("run", {"islands": {"ranks": 2}}, "islands.ranks = 2: with sync.schedule"),
        ("script", {"islands": {"ranks": 2}}, "islands.ranks = 2: with sync.schedule"),
        ("sim", {"sim": {"problem": "quadratic"}}, "a clock of steps has none; use sim.clock=poisson"),
        ("sim", {"sim": {"step_s": 0.1}}, "a clock of steps has none; use sim.clock=poisson"),
        ("run", {"train": {"consensus_every": 5}}, "train.consensus_every = 5: all islands wait for each other"),
        ("sim", {"train": {"consensus_every": 5}}, "train.consensus_every = 5: all islands wait for each other"),
        ("run", {"train": {"eval_merged": True}}, "train.eval_merged = true: all islands wait for each other"),
    ],
)
def test_where_nobody_can_be_ready_is_said_before_anything_starts(how: How, changes: dict[str, object], said: str) -> None:
    sync = {"recipe": "a2cid2", "schedule": "ready"}
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        check_answers(parse_job({"sync": sync, **changes}), how)
    assert "\n" not in str(caught.value)
    poisson = parse_job({"sync": sync, "sim": {"problem": "quadratic", "clock": "poisson"}})
    check_answers(poisson, "sim")
    check_answers(parse_job({"sync": sync}), "sim")


def test_a_row_of_ones_own_may_be_what_says_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from dataclasses import replace\nfrom dtrain.recipes import RECIPES\n"
        'ROW = replace(RECIPES["a2cid2"], name="mine", schedule="ready")\n'
    )
    job = parse_job({"sync": {"recipe": "mine.py:ROW"}, "sim": {"problem": "quadratic"}})
    with pytest.raises(ValueError, match=r"a clock of steps has none; use sim\.clock=poisson"):
        check_answers(job, "sim")


def test_a_rank_for_no_matrix_of_the_jobs_model_is_seen_before_anything_runs() -> None:
    """Of width 16: 48 x 16, 16 x 16 and 64 x 16, of which 12 (64 + 16) is less than 64 x 16."""
    small = {"sync": {"recipe": "dilocox"}, "model": {"width": 16, "heads": 2}}
    with pytest.raises(ValueError, match=r"^sync\.rank = 32: .* use sync\.rank = 12 or less, or sync\.reduce = \"all_to_all\"$"):
        check_answers(parse_job(small), "run")
    check_answers(parse_job({**small, "sync": {"recipe": "dilocox", "rank": 12}}), "run")
    check_answers(parse_job(small), "script")


def test_round_is_a_delay_of_the_whole_period() -> None:
    assert resolve("diloco", {"delay": "round", "every": 9}, 2).delay_steps == 9


@pytest.mark.parametrize("name", RECIPES)
def test_a_runs_own_job_file_can_be_read_again(name: str) -> None:
    job = resolved(parse_job({"sync": {"recipe": name}}))
    again = parse_job(tomllib.loads(dump_job(job)))
    assert again == job
    assert of_section(again.sync.model_dump(exclude_none=True), 2) == RECIPES[name]


def test_an_h_that_adapts_has_a_text_and_is_replaced_by_a_number() -> None:
    recipe = resolve("dilocox", ADAPTS, 2)
    assert (recipe.every, recipe.delay_steps, recipe.every_adapts, recipe.least_every) == (50, 50, True, 1)
    assert resolve("dilocox", {**ADAPTS, "delay": 5, "landing": "keep"}, 2).least_every == 6
    assert resolve("dilocox", {**ADAPTS, "every": 50}, 2).least_every == 50
    answers = {axis: answer_of(recipe, axis) for axis in AXES}
    assert answers["every"] == "adaptive:50"
    assert resolve("dilocox", answers, 2) == recipe
    assert answers_written(recipe, 2)["every"] == "adaptive:50"
    assert answers_written(replace(recipe, every=125), 2)["every"] == "adaptive:125", "though its row says 125"


def test_every_axis_is_a_key_of_the_job_file() -> None:
    assert set(AXES) == set(Sync.model_fields) - {"recipe", "level"}
    assert set(AXES) <= {field.name for field in fields(Recipe)}
