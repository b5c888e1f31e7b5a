import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.budget import Budget
from thrifty.core.plan import (
    MemoryPlan,
    ModelSource,
    Objective,
    Plan,
    PoolSource,
    Selection,
    Target,
    Training,
    dump,
    from_dict,
    load,
    parse_override,
    put,
)

LEAST = {
    "model": {"path": "models/tiny"},
    "pool": {"sources": ["pool.jsonl"]},
    "budget": {"flops": "3e15"},
}


def written(**changes):
    """The least plan with ``training__max_steps=5``-like changes, as plain values."""
    values = yaml.safe_load(yaml.safe_dump(LEAST))
    for key, value in changes.items():
        put(values, key.replace("__", "."), value)
    return values


def problems(**changes):
    with pytest.raises(ValueError, match=r"the plan cannot be used:\n(.|\n)*\nhint: ") as refusal:
        from_dict(written(**changes))
    return str(refusal.value).splitlines()[1:-1]


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "plan.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# -- there and back --------------------------------------------------------------------------------

amounts = st.floats(1e-6, 1e9)


def adapters(rank):
    return {"lora": {"rank": rank}}


plans = st.builds(
    Plan,
    task=st.sampled_from(["sft", "continued"]),
    model=st.builds(ModelSource, path=st.text(min_size=1), revision=st.none() | st.text()),
    pool=st.builds(PoolSource, sources=st.lists(st.text(), min_size=1).map(tuple)),
    targets=st.dictionaries(
        st.text(),
        st.builds(
            Target,
            signal=st.lists(st.text(), min_size=1).map(tuple),
            weight=amounts,
        ),
        max_size=2,
    ),
    budget=st.builds(
        Budget,
        flops=st.none() | st.floats(1e-6, 1e30),
        seconds=st.none() | amounts,
        memory_bytes=st.none() | st.floats(1e6, 1e18),  # fewer are taken for a forgotten unit
    ),
    objective=st.builds(Objective, dollars_per_unit=st.none() | amounts),
    selection=st.builds(
        Selection,
        scorer=st.sampled_from(["length", {"length": {"near": 40}}, {"uniform": None}]),
        filters=st.sampled_from([(), ("duplicates",), ({"overlap": None}, "duplicates")]),
        max_tokens=st.none() | amounts,
        seed=st.integers(0, 2**32 - 1),
    ),
    training=st.builds(
        Training,
        memory=st.builds(
            MemoryPlan,
            trained=st.just("full") | st.builds(adapters, st.integers(1, 10**6)),
            activations=st.sampled_from(["keep", "recompute"]),
        ),
        learning_rate=amounts,
        max_steps=st.integers(1, 10**9),
    ),
    control=st.booleans(),
    dollars_per_hour=st.none() | amounts,
    predicted=st.dictionaries(
        st.text(), st.dictionaries(st.text(), st.none() | st.floats(-1e300, 1e300))
    ),
    why=st.dictionaries(st.text(), st.text()),
)


@settings(max_examples=50)
@given(plans)
@pytest.mark.long
def test_a_plan_survives_its_file(plan):
    assert from_dict(yaml.safe_load(dump(plan))) == plan


def test_load_reads_what_dump_wrote(file):
    plan = from_dict(written(why={"x": "naïve ✓ \u2028 'quoted' # no comment", "y": "null"}))
    assert load(file(dump(plan))) == plan


def test_people_may_write_amounts_as_they_do(file):
    path = file(
        """
        model: {path: m}
        pool: {sources: [a.jsonl]}
        budget: {flops: 3e17, tokens: 20M, seconds: 1h30m, dollars: $20, memory_bytes: 24GiB}
        selection: {max_tokens: 1.5B}
        objective: {dollars_per_unit: $5}
        training: {learning_rate: 2e-4, max_steps: 1e3}
        dollars_per_hour: $2.50
        """
    )
    plan = load(path)
    assert plan.budget == Budget(
        flops=3e17, tokens=2e7, seconds=5400, dollars=20, memory_bytes=24 * 2**30
    )
    assert plan.dollars_per_hour == 2.5
    assert (plan.selection.max_tokens, plan.objective.dollars_per_unit) == (1.5e9, 5)
    assert (plan.training.learning_rate, plan.training.max_steps) == (2e-4, 1000)
    assert isinstance(plan.training.max_steps, int)


def test_defaults_fill_what_is_left_out():
    plan = from_dict(LEAST)
    assert (plan.task, plan.selection.scorer, plan.stopping) == ("sft", "uniform", "marginal_gain")
    assert plan.training == Training()


# -- overrides -------------------------------------------------------------------------------------


def test_overrides_change_one_value_each(file):
    path = file(yaml.safe_dump(LEAST))
    plan = load(
        path,
        [
            "training.seed=7",
            "budget.flops=1e12",
            "budget.seconds=2h",
            "selection.scorer={perplexity: {band: high}}",
            "targets.code.signal=[a.jsonl, b.jsonl]",
            "pool.sources=['x=y.jsonl']",
            "model.revision='1234'",
        ],
    )
    assert (plan.training.seed, plan.budget.flops, plan.budget.seconds) == (7, 1e12, 7200)
    assert plan.selection.scorer == {"perplexity": {"band": "high"}}
    assert plan.targets["code"].signal == ("a.jsonl", "b.jsonl")
    assert plan.pool.sources == ("x=y.jsonl",)
    assert plan.model.revision == "1234"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "cannot read --set"),
        ("=3", "cannot read --set"),
        ("training..seed=3", "cannot read --set"),
        ("training.seed=[", "is not valid YAML"),
        ("budget.flops=!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("model.path.x=3", "path holds a value"),
        ("training.sed=3", "unknown key training.sed: did you mean seed"),
        ("training.seed=x", "must be a whole number"),
    ],
)
def test_an_override_that_cannot_be_is_refused(file, override, message):
    path = file(yaml.safe_dump(LEAST))
    with pytest.raises(ValueError, match=message + r"(.|\n)*\nhint: "):
        load(path, [override])


def test_an_override_may_hold_any_sign():
    assert parse_override("a.b=c=d") == ("a.b", "c=d")
    assert parse_override("a=") == ("a", None)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("modle", {}, "unknown key modle: did you mean model?"),
        ("training__max_stps", 3, "unknown key training.max_stps: did you mean max_steps?"),
        (
            "training__memory__traned",
            3,
            "unknown key training.memory.traned: did you mean trained?",
        ),
        ("training__Max-Steps", 3, "unknown key training.Max-Steps: did you mean max_steps?"),
        ("budget__memory", "3GiB", "unknown key budget.memory: did you mean memory_bytes?"),
        ("targets", {"a": {"signal": [], "wait": 1}}, "unknown key targets.a.wait: did you mean w"),
        ("selection__x", 1, "unknown key selection.x: known: filters, groups, max_tokens, picker"),
        ("selection__scorer", "bm52", "selection.scorer: there is no scorer 'bm52'; did you mean"),
        ("selection__scorer", {"bm25": {"k1_": 1}}, "unknown key scorer.bm25.k1_: did you mean k1"),
        ("selection__scorer", {"bm25": {"k1": "x"}}, "scorer.bm25.k1 must be a number, not 'x'"),
        ("selection__scorer", {"bm25": {}, "length": {}}, "scorer must be a name or one name with"),
        ("selection__filters", ["dups"], "selection.filters[0]: there is no filter 'dups'"),
        ("selection__filters", "overlap", "selection.filters must be a list, not 'overlap'"),
        ("stopping", 5, "stopping: stopping must be a name or one name with its options"),
        ("task", "sfft", "task must be one of sft, continued, preference, not 'sfft'"),
        ("training__max_steps", True, "training.max_steps must be a whole number, not True"),
        ("training__max_steps", 2.5, "training.max_steps must be a whole number, not 2.5"),
        ("training__max_steps", None, "training.max_steps must be a whole number, not None"),
        ("training__epochs", float("nan"), "training.epochs must be a number, not nan"),
        ("training__learning_rate", float("inf"), "training.learning_rate must be a number"),
        ("training__learning_rate", 10**400, "training.learning_rate must be a number"),
        ("training", None, "training must be a mapping, not None"),
        ("training", [1], "training must be a mapping, not [1]"),
        ("control", "no", "control must be true or false, not 'no'"),
        ("control", 1, "control must be true or false, not 1"),
        ("model__revision", 1234, "model.revision must be text, not 1234; put it in quotes"),
        ("pool__sources", "a.jsonl", "pool.sources must be a list, not 'a.jsonl'"),
        ("pool__sources", ["a", 3], "pool.sources[1] must be text, not 3; put it in quotes"),
        ("targets", ["a"], "targets must be a mapping from names, not ['a']"),
        ("targets", {1: {"signal": ["a"]}}, "targets must be a mapping from names"),
        ("targets", {"a": {}}, "targets.a.signal is missing"),
        ("budget__flops", "-3", "budget.flops: FLOPs must be more than zero and finite, not '-3'"),
        ("budget__flops", "3e17/s", "budget.flops: '3e17/s' is a rate"),
        ("budget__seconds", "2 parsecs", "budget.seconds: unknown unit 'parsecs'"),
        ("budget__joules", -4, "budget: the budget's joules must be a number, more than zero"),
        ("predicted__train__flops", "x", "predicted.train.flops must be a number, not 'x'"),
        ("why__x", 3, "why.x must be text, not 3"),
    ],
)
def test_one_mistake_is_named_with_its_place(key, value, message):
    (problem,) = problems(**{key: value})
    assert problem.startswith(message) or message in problem


@pytest.mark.parametrize("key", ["model", "pool", "budget"])
def test_what_is_missing_is_named(key):
    values = written()
    del values[key]
    with pytest.raises(ValueError, match=f"\n{key} is missing\n"):
        from_dict(values)


def test_all_mistakes_are_reported_at_once():
    found = problems(
        training__max_stps=3,
        training__learning_rate="abc",
        training__memory__trained={"lora": {"rank": "x"}},
        budget__flops="-3",
        budget__sconds=3,
        selection__scorer="bm52",
        task="sfft",
        targets={"a": {"signl": "x"}},
    )
    assert len(found) == 9  # the target's key, and that it has no signal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__eval_steps": 0}, "training.eval_steps must be more than zero, not 0"),
        ({"training__learning_rate": -1}, "training.learning_rate must be more than zero"),
        ({"training__weight_decay": -1}, "training.weight_decay cannot be negative"),
        ({"training__warmup_steps": 5}, "warmup_steps 5 + cooldown_steps 0 do not fit in max_ste"),
        ({"training__eval_steps": 2, "training__save_steps": 3}, "is not a multiple of eval_steps"),
        ({"training__replay_share": 1.0, "task": "continued"}, "replay_share must be in [0, 1)"),
        ({"training__replay_share": 0.5}, "needs task: continued and training.replay"),
        (
            {"training__memory__trained": {"lora": {"rank": 0}}},
            "trained.lora: rank must be at least 1",
        ),
        ({"training__seed": -1}, "training.seed must be in [0, 2^32), not -1"),
        ({"model__path": ""}, "model.path is empty"),
        ({"pool__sources": []}, "pool.sources is empty"),
        ({"targets__a": {"signal": ["x"], "weight": 0}}, "targets.a.weight must be more than"),
        ({"targets__a": {"signal": []}}, "targets.a.signal is empty"),
        ({"selection__scorer": "bm25"}, "selection.scorer bm25 needs a target"),
        (
            {"task": "preference", "selection__scorer": "perplexity"},
            "selection.scorer perplexity makes no sense for task preference",
        ),
    ],
)
def test_contradictions_are_named(changes, message):
    assert any(message in problem for problem in problems(**changes))


# -- files that are no plan ------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no plan"),
        ("# nothing\n", "holds no plan"),
        ("- a\n- b\n", "holds no plan"),
        ("just words", "holds no plan"),
        ("model: [", "is not valid YAML"),
        ("model:\n\tpath: x", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("when: 2024-13-45", "is not valid YAML"),
        ("x: " + "9" * 5000, "is not valid YAML"),
        ("[" * 1500, "is not valid YAML"),
        (BOMB, "an alias, which a plan may not hold, in line 2"),
        ("&a model: *a", "an alias"),
        ("training: {seed: 1}\npool: {}\ntraining: {seed: 2}", "a key stands twice"),
        ("? [a, b]\n: c", "is not valid YAML"),
        ("model: !!python/object/apply:os.system ['touch harmed']", "is not valid YAML"),
        ("model: !!python/name:os.system", "is not valid YAML"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not a text file"),
        ("a: \x00", "is not valid YAML"),
        ("model: {path: m}".encode("utf-16"), "is not a text file"),
        ("version: 2", "the plan has version 2, this thrifty reads 1"),
        ("version: [1]", r"the plan has version \[1\]"),
    ],
    ids=range(21),
)
def test_a_file_that_is_no_plan_is_refused(file, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = file(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message + r"(.|\n)*\nhint: ") as refusal:
        load(path)
    assert len(str(refusal.value)) < 1000
    assert time.monotonic() - start < 20  # a bomb would not end
    assert not Path("harmed").exists()


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no plan at .*\nhint: `thrifty plan"):
        load(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match=r"cannot read .*\nhint: "):
        load(tmp_path)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
sections = st.dictionaries(
    st.sampled_from(["path", "sources", "flops", "scorer", "lora", "seed", "signal", "x"]),
    plain_values,
    max_size=4,
)


@given(
    st.dictionaries(
        st.sampled_from([*Plan.__dataclass_fields__, "x"]), plain_values | sections, max_size=6
    )
)
def test_any_values_are_a_plan_or_are_refused(values):
    try:
        plan = from_dict({**LEAST, **values})
    except ValueError as error:
        refusal = str(error)
    else:
        assert isinstance(plan, Plan)
        return
    assert "\nhint: " in refusal
