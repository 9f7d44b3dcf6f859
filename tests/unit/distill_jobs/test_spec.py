"""What a job may say, and that what it may not say is refused by name before anything is queued."""

import json
from typing import Any

import pytest

from distill_jobs import plan
from distill_jobs import spec as specs
from distill_jobs.student_spec import LoraSpec
from engines.errors import FewstepError, InvalidRequest, NotBuilt, UnknownPlugin
from engines.manifest import Guidance


def job(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "teacher": {"id": "shapes"},
        "student": {"name": "small", "steps": [1, 2]},
        "method": {"name": "kd"},
        "train": {"iterations": 100},
    }
    return {**body, **changes}


def test_the_shipped_job_is_valid_and_states_its_own_gates() -> None:
    spec = specs.parse(specs.preset("shapes-fast"))
    assert spec.gates.fd_ratio == {1: 1.8, 2: 1.5, 4: 1.3}
    assert [stage.name for stage in spec.stages] == ["kd"]
    assert spec.publish is not None
    assert spec.publish.tiers == {"low": 1, "medium": 4}


def test_what_was_parsed_is_parsed_again_to_the_same() -> None:
    spec = specs.parse(job(method=[{"name": "kd", "pairs": 64}, {"name": "sid", "share": 0.25}]))
    assert specs.parse(spec.canonical()) == spec
    assert spec.stages[0].fields == {"pairs": 64}


def test_stages_without_a_share_divide_what_is_left() -> None:
    spec = specs.parse(job(method=[{"name": "kd", "share": 0.5}, {"name": "sid"}, {"name": "dmd"}]))
    assert spec.shares == pytest.approx((0.5, 0.25, 0.25))


def forgets(rules: list[dict[str, str]], **changes: Any) -> dict[str, Any]:
    return job(student={"name": "small", "steps": [1, 2], "forget": rules}, **changes)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (job(gate={}), "gate"),
    (job(student={"name": "small", "stepz": [1]}), "student.stepz"),
    (job(student={"name": "small", "steps": [1, "x"]}), "student.steps.1"),
    (job(student={"name": "Has Spaces"}), "student.name"),
    (job(student={"name": "small", "guidance": {"embedded": [4, 2]}}), "student.guidance"),
    (job(student={"name": "small", "guidance": {"embedded": [1, 99]}}), "student.guidance.embedded.1"),
    (job(method={"name": "kd", "lrr": 1}), "method.lrr"),
    (job(method={"name": "kd", "lr": "fast"}), "method.lr"),
    (job(method=[{"name": "kd"}, {"name": "sid", "fake_lr": -1}]), "method.1.fake_lr"),
    (job(method=[{"name": "kd"}, {"name": "optimal_steps"}]), "method.1"),
    (job(gates={"fd_ratio": "x"}), "gates.fd_ratio"),
    (job(schedule={"name": "gits", "fine": 1}), "schedule.fine"),
    (job(schedule=[{"name": "gits"}, {"name": "ld3", "share": 0.5}]), "schedule.1.share"),
    (job(schedule={"name": "kd"}), "schedule"),
    (job(schedule=[]), "schedule"),
    (job(method={"name": "gas"}, schedule={"name": "gits"}), "schedule"),
    (job(method={"name": "kd", "own_share": 0.5}, student={"name": "small", "steps": [1]}), "method.own_share"),
    (job(method={"name": "backward_distillation"}, student={"name": "small", "steps": [1]}), "method.own_share"),
    (job(method={"name": "lightning"}), "method.counts"),
    (job(method={"name": "sfd"}), "method.counts"),
    (job(method={"name": "kd", "terms": [{"name": "reward", "reward": "beauty"}]}), "method.terms.reward"),
    (job(schedule={"name": "gits", "solvers": ["ddim", "rk45"]}), "schedule.solvers"),
    (job(schedule={"name": "ld3", "reference_solver": "linear"}), "schedule.reference_solver"),
    (job(method={"name": "kd", "teacher_solver": "dx"}), "method.teacher_solver"),
    (job(method={"name": "kd", "grids": {"2": [1.0, 1.0]}}), "method.grids"),
    (job(method={"name": "kd", "grids": {"two": [1.0, 0.5]}}), "method.grids"),
    (job(method={"name": "kd", "grids": {"3": [1.0, 0.6, 0.3]}}), "method.grids"),
    (job(method=[{"name": "kd", "counts": [3], "grids": {"2": [1.0, 0.5]}}, {"name": "kd"}]), "method.0.grids"),
    (job(method=[{"name": "kd", "counts": [0]}, {"name": "kd"}]), "method.0.counts"),
    (job(method={"name": "boot"}, student={"name": "small", "steps": [2]}), "method.counts"),
    (job(student={"name": "n" * 56}), "student.name"),
    (job(method={"name": "dmd", "terms": [{"name": "adversarial"}]}), "method"),
    (job(method={"name": "lcm", "generate": 0}), "method"),
    (job(method={"name": "kd", "terms": [{"name": "adversarial"}, {"name": "adversarial"}]}), "method.terms"),
    (job(method={"name": "ladd", "terms": [{"name": "adversarial"}]}), "method.terms"),
    (job(data={"prompts": 3}), "data.prompts"),
    (job(train={"iterations": 0}), "train.iterations"),
    (job(eval={"samples": 100, "small_samples": 200}), "eval"),
    (job(student={"name": "small", "steps": [1], "quantise": "int2"}), "student.quantise"),
    (
        job(student={"name": "small", "steps": [1], "quantise": "int8", "train": {"lora": {"rank": 4}}}),
        "student",
    ),
    (job(student={"name": "small", "quantise": "int8"}, method={"name": "gas"}), "student.quantise"),
    (forgets([]), "student.forget"),
    (forgets([{"concept": " ", "instead": "blue"}]), "student.forget.0.concept"),
    (forgets([{"concept": "red"}, {"concept": "ring", "insted": "cross"}]), "student.forget.1.insted"),
    (forgets([{"concept": "red", "instead": "Red"}]), "student.forget.0"),
    (forgets([{"concept": "red", "instead": "a dark red"}]), "student.forget.0"),
    (forgets([{"concept": "red", "instead": "blue"}, {"concept": "blue"}]), "student"),
    (forgets([{"concept": "red"}, {"concept": "red ring", "instead": "cross"}]), "student"),
    (forgets([{"concept": "red"}], data={"prompts": ["a blue ring", "a bored cat"]}), "student.forget"),
    (forgets([{"concept": "red"}], method={"name": "gas"}), "student.forget"),
    (job(eval={"networks": ["../elsewhere"]}), "eval.networks.0"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_a_wrong_field_is_refused_by_its_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        specs.parse(body)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (job(train={}), "no end"),
        (job(publish={"deployment": "shapes", "tiers": {"low": 4}}), r"asks for \[4\] steps"),
        (job(gates={"fd_ratio": {"1": 1.5}}), r"no limit for \[2\] steps"),
        (job(eval={"networks": ["dinov2", "dinov2"]}), "names one twice"),
        (job(gates={"networks": {"dinov2": 1.5}}), r"gates.networks names dinov2: eval.networks must too"),
        (
            job(eval={"networks": ["dinov2"]}, gates={"networks": {"dinov2": {"1": 1.5}}}),
            r"gates\.networks\.dinov2 has no limit for \[2\] steps",
        ),
        (
            job(eval={"networks": ["clip.b"]}, gates={"networks": {"clip.b": {"1": 1.5, "2": 1.5, "4": 1.5}}}),
            r"gates\.networks\.clip\.b asks for \[4\] steps",
        ),
        (job(method=[{"name": "kd", "share": 0.7}, {"name": "sid", "share": 0.7}]), "shares"),
        (job(method=[]), "empty list"),
        (job(data={"prompts": ["a"], "pairs": "dj_1"}), "choose one"),
    ],
)
def test_fields_that_contradict_are_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        specs.parse(body)


def test_a_student_may_forget_and_what_it_says_of_that_is_kept() -> None:
    rules = [{"concept": "red", "instead": "blue"}, {"concept": "ring"}]
    spec = specs.parse(forgets(rules, data={"prompts": ["a Red ring"]}))
    assert [(rule.concept, rule.instead) for rule in spec.student.forgets] == [("red", "blue"), ("ring", "")]
    assert specs.parse(spec.canonical()) == spec
    assert specs.parse(job()).student.forgets == ()


@pytest.mark.parametrize(("said", "bits"), [("int8", 8), ("int4", 4), (None, None)])
def test_the_grid_of_weights_has_its_bits(said: str | None, bits: int | None) -> None:
    assert specs.parse(job(student={"name": "small", "steps": [1, 2], "quantise": said})).student.weight_bits == bits


def experts(levels: Any = (0.6,), **more: Any) -> dict[str, Any]:
    student = {key: value for key, value in more.items() if key in ("steps", "train", "quantise", "slim")}
    rest = {key: value for key, value in more.items() if key not in student}
    return job(student={"name": "small", "steps": [2, 4], "experts": levels} | student, **rest)


def test_a_student_may_be_several_networks_whatever_its_method() -> None:
    for method in ("kd", "dmd", "lsd", "phased_dmd"):
        spec = specs.parse(experts([0.7, 0.3], steps=[3, 4], method={"name": method}))
        assert specs.parse(spec.canonical()).student.experts == (0.7, 0.3)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (experts([0.3, 0.7]), "student", "falling noise levels"),
        (experts([1.0]), "student.experts.0", "less than 1"),
        (experts([]), "student.experts", "at least 1 item"),
        (experts(train={"lora": {"rank": 4}}), "student", "train full"),
        (experts(quantise="int8"), "student", "leave it out, or experts"),
        (experts(method={"name": "phased_dmd"}, steps=[1, 4]), "method.counts", "2 phases need at least a step each"),
        (
            experts(method={"name": "phased_dmd", "grids": {"4": [1.0, 0.8, 0.5, 0.3]}}),
            "method.counts",
            r"must hold the levels where a phase ends, \(0.6,\)",
        ),
        (experts(method={"name": "gits"}), "student.experts", "gits trains no weights"),
        (experts(method={"name": "pi_flow"}), "student.experts", "pi_flow trains one network alone"),
        (experts(method=[{"name": "koala"}, {"name": "kd"}]), "student.experts", "koala trains one network alone"),
    ],
)
def test_experts_that_cannot_be_are_refused_when_submitted(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refusal:
        specs.parse(body)
    assert refusal.value.param == param


def test_experts_are_trained_by_one_process_yet() -> None:
    body = job(student={"name": "a", "steps": [2], "experts": [0.5]}, train={"iterations": 1, "processes": 2})
    with pytest.raises(NotBuilt, match="one process yet"):
        specs.parse(body)


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownPlugin, match="kd"):
        specs.parse(job(method={"name": "alchemy"}))


def test_more_counts_than_a_method_makes_a_student_for_are_refused_when_submitted() -> None:
    with pytest.raises(InvalidRequest, match=r"counts.*1 at most"):
        specs.parse(job(method={"name": "progressive"}, student={"name": "small", "steps": [1, 2, 4]}))
    specs.parse(job(method={"name": "progressive"}, student={"name": "small", "steps": [4]}))


def test_several_counts_are_allowed_where_another_stage_gives_the_student_its_second_time() -> None:
    specs.parse(job(method=[{"name": "std"}, {"name": "lightning"}]))
    specs.parse(job(method={"name": "sfd_v"}))
    specs.parse(job(method={"name": "lightning"}, student={"name": "small", "steps": [4]}))


def test_step_zero_is_the_search_that_the_job_names() -> None:
    def names(**changes: Any) -> list[str]:
        return [search.name for search in specs.parse(job(**changes)).searches]

    assert names() == ["optimal_steps"]
    assert names(schedule={"name": "ld3"}) == ["ld3"]
    assert names(schedule=[{"name": "gits"}, {"name": "gas", "iterations": 5}]) == ["gits", "gas"]
    assert names(method={"name": "amed"}) == ["amed"]
    assert names(method=[{"name": "optimal_steps"}, {"name": "amed"}]) == ["optimal_steps", "amed"]
    spec = specs.parse(job(schedule={"name": "gas", "iterations": 5}))
    assert specs.parse(spec.canonical()) == spec


def test_an_unknown_term_is_refused_by_name() -> None:
    with pytest.raises(UnknownPlugin, match="method: term 'alchemy' does not exist"):
        specs.parse(job(method={"name": "kd", "terms": [{"name": "alchemy"}]}))


def test_processes_must_share_every_stages_batch_equally() -> None:
    chain = [{"name": "kd", "batch": 12}, {"name": "sid"}]  # sid's own batch is 32
    specs.parse(job(method=chain, train={"iterations": 1, "processes": 4}))
    with pytest.raises(
        InvalidRequest, match=r"method\.0: a batch of 12 rows .*processes=8: choose a multiple"
    ) as caught:
        specs.parse(job(method=chain, train={"iterations": 1, "processes": 8}))
    assert caught.value.param == "train.processes"
    with pytest.raises(InvalidRequest, match=r"method\.1: a batch of 32 rows"):
        specs.parse(job(method=chain, train={"iterations": 1, "processes": 3}))
    specs.parse(job(method={"name": "sid"}, train={"iterations": 1, "processes": 3, "batch": 9}))


def test_one_process_has_nobody_to_spread_its_networks_over() -> None:
    with pytest.raises(InvalidRequest, match="say processes=2 or more"):
        specs.parse(job(train={"iterations": 1, "shard": True}))


def test_the_shared_backbone_of_a_lora_is_not_spread() -> None:
    lora = {"name": "small", "steps": [1], "train": {"lora": {"rank": 8}}}
    with pytest.raises(InvalidRequest, match="leave shard out"):
        specs.parse(job(student=lora, train={"iterations": 1, "processes": 2, "shard": True}))


@pytest.mark.parametrize(
    "body",
    [
        job(data={"pairs": "dj_0"}),
    ],
)
def test_what_is_documented_and_not_built_says_so(body: dict[str, Any]) -> None:
    with pytest.raises(NotBuilt, match="not built yet"):
        specs.parse(body)


def lora_job(method: str = "dmd", **lora: Any) -> dict[str, Any]:
    return job(student={"name": "small", "steps": [1, 2], "train": {"lora": lora}}, method={"name": method})


def test_a_lora_student_has_every_role_trained_as_one() -> None:
    spec = specs.parse(lora_job(rank=8))
    assert spec.student.lora == LoraSpec(rank=8, alpha=None, targets="auto")
    assert plan.settings(spec) == [{"counts": [1, 2], "train": "lora"}]
    assert plan.settings(specs.parse(job())) == [{"counts": [1, 2]}]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (lora_job(rank=0), "student.train.lora.rank", "greater than or equal to 1"),
        (lora_job(alpha=0), "student.train.lora.alpha", "greater than 0"),
        (lora_job(ranks=4), "student.train.lora.ranks", "unknown field"),
        (lora_job("lsd"), "student.train", "the student would read s.*use student.train: full"),
        (
            job(student={"name": "a", "train": {"lora": {}}, "guidance": {"embedded": [1, 3]}}),
            "student.train",
            "the student would read w",
        ),
        (job(method={"name": "kd", "train": "lora"}), "method.train", "contradicts student.train, which says full"),
    ],
)
def test_a_lora_that_cannot_be_is_refused_when_submitted(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(FewstepError, match=words) as refusal:
        specs.parse(body)
    assert refusal.value.param == param


SLIM = {"name": "small", "steps": [1, 2], "slim": {"middle": False}}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (job(schedule={"name": "gits", "counts": [3]}), r"schedule.counts=\[3\] are not student.steps=\[1, 2\]"),
        (job(method={"name": "gits", "counts": [3]}), r"method.counts=\[3\] are not"),
        (job(method=[{"name": "kd"}, {"name": "kd", "counts": [1]}]), r"method.1.counts=\[1\] are not"),
        (job(student=SLIM), "must teach the smaller network"),
        (job(student=SLIM, method=[{"name": "kd"}, {"name": "slimming"}]), "must teach the smaller network"),
        (job(student=SLIM, method={"name": "slimming"}), "few-step method follow it"),
        (job(student=SLIM, method={"name": "gits"}), "student.slim: gits trains no weights"),
        (
            job(student={"name": "small", "steps": [1], "train": {"lora": {}}}, method={"name": "gits"}),
            "student.train.lora: gits trains no weights",
        ),
    ],
)
def test_what_could_only_fail_while_it_runs_is_refused_before(body: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        specs.parse(body)


def test_a_first_stage_may_be_for_other_counts_and_a_search_be_asked_for_with_many_processes() -> None:
    specs.parse(job(method=[{"name": "guidance", "counts": [16]}, {"name": "kd"}]))
    specs.parse(job(student=SLIM, method=[{"name": "koala"}, {"name": "kd"}]))
    specs.parse(job(method={"name": "gits"}, train={"iterations": 1, "processes": 3}))


def test_a_term_says_when_it_joins_beside_its_own_settings() -> None:
    late = {"name": "reward", "weight": 0.05, "after": 0.5, "ramp": 0.1, "held_out": "colourfulness"}
    (stage,) = plan.drafted(specs.parse(job(method={"name": "kd", "terms": [late]})))
    settings = {"held_out": late.pop("held_out")}
    assert stage.terms == ({**late, "settings": settings},)
    assert specs.parse(job(method={"name": "kd", "terms": [late]})) == specs.parse(
        specs.parse(job(method={"name": "kd", "terms": [late]})).canonical()
    )
    with pytest.raises(InvalidRequest) as caught:
        specs.parse(job(method={"name": "kd", "terms": [{**late, "after": 1.0}]}))
    assert caught.value.param == "method.terms.0.after"


def test_latents_come_from_the_job_or_from_the_method_and_terms_of_one_name_may_be_several() -> None:
    gan = {"name": "adversarial"}
    specs.parse(job(method={"name": "kd", "terms": [gan, {"name": "moment"}, {"name": "moment", "tau_max": 0.5}]}))
    specs.parse(job(method={"name": "dmd", "terms": [gan]}, data={"images": "shapes"}))
    specs.parse(job(method={"name": "lcm", "generate": 0}, data={"images": "shapes"}))
    specs.parse(job(student={"name": "n" * 55}))
    specs.parse(job(student={"name": "n" * 64, "steps": [1, 2]}, method={"name": "gits"}))


def test_a_body_that_is_no_json_is_refused() -> None:
    with pytest.raises(FewstepError, match="not JSON"):
        specs.parse(b"{teacher")


# guidance that the student reads -------------------------------------------------------------------------------------

WEIGHTED = {"name": "small", "steps": [1, 2], "guidance": {"embedded": [1, 4]}}
CFG = Guidance(mode="cfg", default=2.0, minimum=1.0, maximum=8.0)


def test_a_student_of_a_range_of_weights_reads_w_whatever_else_its_methods_read() -> None:
    assert specs.inputs(specs.parse(job(student=WEIGHTED, method={"name": "lcm"}))) == {"w"}
    assert specs.inputs(specs.parse(job(student=WEIGHTED, method={"name": "lsd"}))) == {"s", "w"}
    assert specs.inputs(specs.parse(job(method={"name": "lcm"}))) == frozenset()


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ({"name": "dmd"}, "dmd"),
        ([{"name": "kd"}, {"name": "ladd"}], "ladd"),
        ({"name": "kd", "terms": [{"name": "adversarial"}]}, "adversarial"),
        ({"name": "ect"}, "ect"),
        ({"name": "optimal_steps"}, "optimal_steps"),
    ],
)
def test_who_judges_samples_without_their_weight_cannot_train_such_a_student(method: Any, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} cannot train a student that reads its guidance weight.*, lcm,"):
        specs.parse(job(student=WEIGHTED, method=method))


@pytest.mark.parametrize(
    ("teacher", "asked", "words"),
    [
        (Guidance(), {}, "none at all"),
        (CFG.model_copy(update={"maximum": 3.0}), {}, r"\[1.0, 4.0\] is outside the teacher's weights, 1.0..3.0"),
        (CFG, {"guidance": 5.0}, r"teacher.guidance=5.0 is outside student.guidance.embedded=\[1.0, 4.0\]"),
        (CFG.model_copy(update={"default": 6.0}), {}, "teacher.guidance=6.0"),
    ],
)
def test_the_range_lies_in_the_teachers_and_holds_the_weight_of_the_job(
    teacher: Guidance, asked: dict[str, Any], words: str
) -> None:
    spec = specs.parse(job(student=WEIGHTED, method={"name": "lcm"}, teacher={"id": "shapes", **asked}))
    with pytest.raises(InvalidRequest, match=words):
        specs.check_weights(spec, teacher)
    specs.check_weights(specs.parse(job(teacher={"id": "shapes", **asked})), teacher)


def test_a_range_that_the_teacher_has_is_allowed() -> None:
    specs.check_weights(specs.parse(job(student=WEIGHTED, method={"name": "lcm"})), CFG)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_has_not_are_refused_wherever_they_stand(value: str) -> None:
    body = json.dumps(job(method={"name": "kd", "lr": "here"})).replace('"here"', value).encode()
    for told in (body, json.loads(body)):
        with pytest.raises(InvalidRequest, match="not JSON"):
            specs.parse(told)
