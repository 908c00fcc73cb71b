"""Which weights fold: exact names in every group, for the kinds of models that people fine-tune."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from foam_hf import FOAM, enable_gradient_release, foam_param_groups
from foam_hf.int8.weight import Int8Weight
from foam_hf.optim_args import SCALES
from foam_hf.optimizer.groups import foam_parameter_names, grouping_options, layer_names
from foam_hf.optimizer.micro_batches import check_accumulation
from foam_hf.optimizer.state import CheckpointMismatchError
from foam_hf.optimizer.tables import OTHERWISE
from foam_hf.trainer.carry_over import continuing_args
from tests.support import tiny_models

pytestmark = pytest.mark.compat

LAYERS = range(tiny_models.LAYERS)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def decoder_layer(i: int, names: tuple[str, ...]) -> list[str]:
    return [f"model.layers.{i}.{name}" for name in names]


def expected_roberta() -> dict[str, list[str]]:
    dense = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    dense += ("intermediate.dense", "output.dense")
    layers = [f"roberta.encoder.layer.{i}" for i in LAYERS]
    embeddings = ("word_embeddings", "token_type_embeddings", "position_embeddings")
    norms = ["roberta.embeddings.LayerNorm"]
    norms += [f"{layer}.{part}.LayerNorm" for layer in layers for part in ("attention.output", "output")]
    return {
        "folded/decay": [f"roberta.embeddings.{name}.weight" for name in embeddings]
        + [f"{layer}.{name}.weight" for layer in layers for name in dense],
        "plain/decay": ["classifier.dense.weight", "classifier.out_proj.weight"],
        "plain/no_decay": [f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]
        + [f"{layer}.{name}.bias" for layer in layers for name in dense]
        + ["classifier.dense.bias", "classifier.out_proj.bias"],
    }


def expected_llama() -> dict[str, list[str]]:
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return {
        "folded/decay": [f"model.layers.{i}.self_attn.{name}.weight" for i in LAYERS for name in ATTENTION]
        + [f"model.layers.{i}.mlp.{name}.weight" for i in LAYERS for name in MLP]
        + ["model.embed_tokens.weight", "lm_head.weight"],
        "plain/no_decay": [name for i in LAYERS for name in decoder_layer(i, norms)] + ["model.norm.weight"],
    }


def expected_qwen2() -> dict[str, list[str]]:
    names = expected_llama()
    names["folded/decay"].remove("lm_head.weight")  # the same tensor as the embedding
    names["plain/no_decay"] += [f"model.layers.{i}.self_attn.{name}.bias" for i in LAYERS for name in ATTENTION[:3]]
    return names


def expected_gpt2() -> dict[str, list[str]]:
    blocks = [f"transformer.h.{i}" for i in LAYERS]
    conv1d = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    norms = [f"{block}.{norm}" for block in blocks for norm in ("ln_1", "ln_2")] + ["transformer.ln_f"]
    return {
        "folded/decay": ["transformer.wte.weight", "transformer.wpe.weight"]
        + [f"{block}.{name}.weight" for block in blocks for name in conv1d],
        "plain/no_decay": [f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]
        + [f"{block}.{name}.bias" for block in blocks for name in conv1d],
    }


def expected_mixtral() -> dict[str, list[str]]:
    names = expected_llama()
    others = [name for name in names["folded/decay"] if "mlp" not in name]
    if any("block_sparse_moe" in name for name, _ in tiny_models.tiny_mixtral().named_parameters()):  # transformers 4
        moe = [f"model.layers.{i}.block_sparse_moe" for i in LAYERS]
        experts = [f"{m}.experts.{e}.{w}.weight" for m in moe for e in range(4) for w in ("w1", "w2", "w3")]
    else:  # fused, three dimensions
        moe = [f"model.layers.{i}.mlp" for i in LAYERS]
        experts = [f"{m}.experts.{w}" for m in moe for w in ("gate_up_proj", "down_proj")]
    names["folded/decay"] = others + [f"{m}.gate.weight" for m in moe] + experts
    return names


def expected_t5() -> dict[str, list[str]]:
    attention, feed_forward = ("q", "k", "v", "o"), ("wi", "wo")
    encoder = [f"encoder.block.{i}.layer" for i in LAYERS]
    decoder = [f"decoder.block.{i}.layer" for i in LAYERS]
    return {
        "folded/decay": [f"{b}.0.SelfAttention.{w}.weight" for b in encoder + decoder for w in attention]
        + [f"{b}.1.EncDecAttention.{w}.weight" for b in decoder for w in attention]
        + [f"{b}.1.DenseReluDense.{w}.weight" for b in encoder for w in feed_forward]
        + [f"{b}.2.DenseReluDense.{w}.weight" for b in decoder for w in feed_forward]
        + ["shared.weight", "lm_head.weight"],
        # The relative position biases are embeddings of two dimensions; "bias" in their name keeps decay away.
        "folded/no_decay": [f"{b[0]}.0.SelfAttention.relative_attention_bias.weight" for b in (encoder, decoder)],
        "plain/no_decay": [f"{b}.{n}.layer_norm.weight" for b in encoder for n in (0, 1)]
        + [f"{b}.{n}.layer_norm.weight" for b in decoder for n in (0, 1, 2)]
        + ["encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"],
    }


def expected_lora_llama() -> dict[str, list[str]]:
    model = "base_model.model.model"
    targets = [f"{model}.layers.{i}.self_attn.{name}" for i in LAYERS for name in ("q_proj", "v_proj")]
    return {
        "folded/decay": [f"{model}.embed_tokens.lora_embedding_{ab}.default" for ab in "AB"]
        + [f"{target}.lora_{ab}.default.weight" for target in targets for ab in "AB"],
        "plain/decay": ["base_model.model.lm_head.modules_to_save.default.weight"],
    }


def expected_mlp() -> dict[str, list[str]]:
    return {
        "folded/decay": ["mixing", "embedding.weight", "input.weight", "output.weight"],
        "plain/no_decay": ["input.bias", "output.bias", "norm.weight", "norm.bias"],
    }


EXPECTED = {
    "roberta": expected_roberta,
    "qwen2": expected_qwen2,
    "llama": expected_llama,
    "gpt2": expected_gpt2,
    "mixtral": expected_mixtral,
    "t5": expected_t5,
    "lora_llama": expected_lora_llama,
    "mlp": expected_mlp,
}


def trainable_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def folded_names(model: nn.Module, **options) -> set[str]:
    names = foam_parameter_names(model, **options)
    return {*names.get("folded/decay", []), *names.get("folded/no_decay", [])}


@pytest.fixture(params=sorted(tiny_models.BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_builder_has_expected_names():
    assert set(EXPECTED) == set(tiny_models.BUILDERS)


def test_exact_names_in_every_group(kind):
    model = tiny_models.BUILDERS[kind]()
    names, expected = foam_parameter_names(model), EXPECTED[kind]()
    assert {group: set(members) for group, members in names.items()} == {g: set(m) for g, m in expected.items()}
    assert list(names) == list(expected), "groups come in the fixed order"
    # Nothing forgotten and nothing twice: the groups are a partition of what is trainable, in the model's order.
    order = trainable_names(model)
    assert sorted(name for members in names.values() for name in members) == sorted(order)
    assert all(members == sorted(members, key=order.index) for members in names.values())


def test_groups_hold_the_named_parameters_with_their_options(kind):
    model = tiny_models.BUILDERS[kind]()
    names = foam_parameter_names(model, tables=True)
    groups = foam_param_groups(model, weight_decay=0.1, level=4, scale=0.5, embedding_scale=0.25)
    by_id = {id(p): name for name, p in model.named_parameters()}
    assert [[by_id[id(p)] for p in group["params"]] for group in groups] == list(names.values())
    for group, key in zip(groups, names, strict=True):
        options = {name: value for name, value in group.items() if name != "params"}
        expected = {
            "folded": {"level": 4, "scale": 0.5},
            "table": {"level": 4, "scale": 0.25, "second_moment": "factored", OTHERWISE: (None, 0.25)},
            "plain": {"level": 0, "scale": 1.0, "second_moment": "block"},
        }[key.split("/")[0]]
        assert options == {"weight_decay": 0.1 if key.endswith("/decay") else 0.0, **expected}


def test_foam_fills_in_what_the_folded_groups_leave_open():
    optimizer = FOAM(
        foam_param_groups(tiny_models.tiny_roberta(), weight_decay=0.1), lr=3e-4, betas=(0.8, 0.9), level=5
    )
    assert [group["level"] for group in optimizer.param_groups] == [5, 5, 0, 0]
    assert [group["scale"] for group in optimizer.param_groups] == [SCALES["block"], SCALES["factored"], 1.0, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert all(group["lr"] == 3e-4 and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_embeddings_and_heads_have_a_scale_and_rule_of_their_own(kind):
    model = tiny_models.BUILDERS[kind]()
    names = foam_parameter_names(model, tables=True)
    tables = {*names.get("table/decay", []), *names.get("table/no_decay", [])}
    parameters = dict(model.named_parameters())

    def fields(optimizer):
        return {
            name: (group["scale"], group["second_moment"])
            for group in optimizer.param_groups
            for name, p in parameters.items()
            if any(p is each for each in group["params"]) and group["level"] != 0
        }

    for options, expected in (
        ({}, (1.0, "factored")),
        ({"level": "row"}, (1.0, "factored")),
        ({"embedding_scale": 2.0}, (2.0, "factored")),
        ({"embedding_rule": "block"}, (SCALES["block"], "block")),
        ({"embedding_rule": "block", "embedding_scale": 2.0}, (2.0, "block")),
        ({"embedding_rule": "factored"}, (1.0, "factored")),
        ({"embedding_scale": 3.0, "embedding_rule": "factored"}, (3.0, "factored")),
    ):
        found = fields(FOAM(foam_param_groups(model, **options), scale=SCALES["block"]))
        assert {name: found[name] for name in found if name in tables} == dict.fromkeys(tables, expected)
        others = {name for name in found if name not in tables}
        assert {name: found[name] for name in others} == dict.fromkeys(others, (SCALES["block"], "block"))


@pytest.mark.parametrize("rule", ["factored", "muon", "adam_mini"])
def test_other_rules_keep_what_they_do_with_embeddings(rule):
    model = tiny_models.tiny_llama()
    plain = foam_param_groups(model, second_moment=rule)
    asked = foam_param_groups(model, second_moment=rule, embedding_scale=0.5, embedding_rule="factored")
    assert [{**group, "params": len(group["params"])} for group in asked] == [
        {**group, "params": len(group["params"])} for group in plain
    ]


@pytest.mark.parametrize(
    ("options", "blocks_alone"),
    [({"embedding_rule": "block"}, False), ({}, True), ({"level": 0, "scale": 3.0}, False)],
)
def test_blocks_at_the_scale_of_all_matrices_make_no_groups(options, blocks_alone):
    model = tiny_models.tiny_llama()
    options = {"scale": 3.0, "embedding_scale": 3.0, **options}
    groups = foam_param_groups(model, **grouping_options(options, blocks_alone=blocks_alone))
    assert "embedding_scale" not in options and "embedding_rule" not in options
    assert len(groups) < len(foam_param_groups(model))
    assert all(group["second_moment"] == "block" for group in FOAM(groups, **options).param_groups)


def test_a_checkpoint_of_blocks_goes_on_where_the_rule_of_embeddings_was_left_open():
    """By hand, whether gradient release with accumulation begins before or after loading."""

    def made(seed):
        torch.manual_seed(seed)
        model = tiny_models.tiny_llama()
        return model, FOAM(foam_param_groups(model), lr=1e-2)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    model, optimizer = made(0)
    check_accumulation(optimizer, 2)
    assert {group["second_moment"] for group in optimizer.param_groups} == {"block"}
    step(model, optimizer, 1)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    step(model, optimizer, 2)
    again, resumed = made(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the rule of embeddings was nobody's wish
        resumed.load_state_dict(saved)
    again.load_state_dict(weights)
    check_accumulation(resumed, 2)
    step(again, resumed, 2)
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def rules_of_tables(optimizer):
    return {group["second_moment"] for group in optimizer.param_groups if group["level"] != 0}


def prepared(optimizer):
    return Accelerator(cpu=True).prepare(optimizer)


def loaded_by_itself(optimizer):  # as accelerate does when it prepares an optimizer
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


@pytest.mark.parametrize(
    "changed",
    [copy.deepcopy, loaded_by_itself, prepared, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
)
def test_that_a_rule_was_left_open_outlives_copies_and_loads(changed):
    optimizer = changed(FOAM(foam_param_groups(tiny_models.tiny_llama())))
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert not any(OTHERWISE in group for group in [*optimizer.param_groups, *optimizer.state_dict()["param_groups"]])
    assert rules_of_tables(optimizer) == {"block", "factored"}
    check_accumulation(optimizer, 2)
    assert rules_of_tables(optimizer) == {"block"}
    assert {group["scale"] for group in optimizer.param_groups if group["level"] != 0} == {SCALES["block"]}


def test_flattened_state_is_loaded_into_groups_whose_rule_was_left_open():
    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    model, options = tiny_models.tiny_llama(), StateDictOptions(flatten_optimizer_state_dict=True)
    optimizer = FOAM(foam_param_groups(model))
    step(model, optimizer, 1)
    saved, again = get_optimizer_state_dict(model, optimizer, options=options), copy.deepcopy(model)
    resumed = FOAM(foam_param_groups(again))
    set_optimizer_state_dict(again, resumed, saved, options=options)
    step(model, optimizer, 2)
    step(again, resumed, 2)
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_what_cannot_be_released_keeps_its_rule():
    """An error changes nothing, be it about the model or about groups of which one has state."""
    model = tiny_models.tiny_llama()
    optimizer = FOAM(foam_param_groups(model, decay_parameter_names={"lm_head.weight"}))
    with pytest.raises(ValueError):
        enable_gradient_release(tiny_models.tiny_llama(), optimizer, accumulation=2)
    assert rules_of_tables(optimizer) == {"block", "factored"}
    model.lm_head.weight.grad = torch.randn_like(model.lm_head.weight)
    optimizer.step()
    with pytest.raises(ValueError, match="embedding_rule='block'"):
        enable_gradient_release(model, optimizer, accumulation=2)
    assert sum(group["second_moment"] == "factored" for group in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("options", "advised"), [({}, ""), ({"embedding_rule": "factored"}, "embedding_rule=factored")]
)
def test_a_checkpoint_with_an_int8_head_goes_on_by_the_options_that_made_it(options, advised):
    """There a rule that was left open is not the one that is given."""
    model = tiny_models.tiny_llama()
    model.lm_head.weight = nn.Parameter(Int8Weight.from_float(model.lm_head.weight, 16), requires_grad=False)
    model.lm_head.weight.requires_grad_(True)
    saved = FOAM(foam_param_groups(model, **options)).state_dict()
    error = CheckpointMismatchError("of other options", saved)
    assert continuing_args(model, None, {"embedding_rule": "block"}, error) == advised


def rules_of(optimizer):
    return {(group["second_moment"], group["scale"]) for group in optimizer.param_groups if len(group["params"]) > 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {("block", 6.0), ("factored", 1.0)}),
        ({"scale": 3.0}, {("block", 3.0), ("factored", 1.0)}),
        ({"level": 0}, {("block", 1.0)}),  # AdamW
        ({"second_moment": "factored"}, {("factored", 1.0)}),
        ({"second_moment": "adam_mini", "scale": 2.0}, {("adam_mini", 2.0)}),
    ],
)
def test_arguments_of_the_optimizer_decide_the_rule_of_embeddings_as_those_of_groups_do(options, expected):
    """By hand the rule and level may be given to FOAM alone."""
    groups = foam_param_groups(tiny_models.tiny_llama(), fold_head=True)
    folded = [group for group in groups if group.get("level") != 0]
    assert rules_of(FOAM(folded, **options)) == expected
    assert rules_of(FOAM(foam_param_groups(tiny_models.tiny_llama(), **options)[: len(expected)])) == expected


@pytest.mark.parametrize("options", [{}, {"scale": 3.0}, {"embedding_scale": 2.0}])
def test_an_int8_head_keeps_the_block_rule_for_which_it_has_kernels(options):
    model = tiny_models.tiny_llama()
    model.lm_head.weight = nn.Parameter(Int8Weight.from_float(model.lm_head.weight, 16), requires_grad=False)
    model.lm_head.weight.requires_grad_(True)
    optimizer = FOAM(foam_param_groups(model, **options))
    found = {
        name: (group["second_moment"], group["scale"])
        for group in optimizer.param_groups
        for name, p in model.named_parameters()
        if any(p is each for each in group["params"]) and "layers" not in name and p.dim() > 1
    }
    scale = options.get("embedding_scale")
    assert found == {
        "model.embed_tokens.weight": ("factored", scale or 1.0),
        "lm_head.weight": ("block", scale or options.get("scale", SCALES["block"])),
    }
    asked = FOAM(foam_param_groups(model, embedding_rule="factored"))
    assert sum(len(g["params"]) for g in asked.param_groups if g["second_moment"] == "factored") == 2


def test_a_checkpoint_does_not_tell_a_rule_that_was_left_open_from_one_that_was_asked_for():
    open_, asked = (
        FOAM(foam_param_groups(tiny_models.tiny_llama(), embedding_rule=rule)) for rule in (None, "factored")
    )
    assert open_.state_dict()["param_groups"] == asked.state_dict()["param_groups"]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_factored_rule_has_the_embedding_scale_also_where_it_is_that_of_all_matrices(scale):
    options = {"scale": scale, "embedding_scale": scale, "embedding_rule": "factored"}
    groups = foam_param_groups(tiny_models.tiny_llama(), **grouping_options(options))
    found = {
        group["second_moment"]: group["scale"] for group in FOAM(groups, **options).param_groups if group["level"]
    }
    assert found == {"block": scale, "factored": scale}


@pytest.mark.parametrize("rule", ["block", "factored", "muon", "adam_mini"])
@pytest.mark.parametrize("option", [{"embedding_scale": -1.0}, {"embedding_rule": "muon"}])
def test_illegal_values_for_embeddings_are_refused_with_every_rule(rule, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*; expected"):
        foam_param_groups(tiny_models.tiny_llama(), second_moment=rule, **option)


def test_decay_rule_is_trainers_own(kind, tmp_path):
    from transformers import Trainer

    model = tiny_models.BUILDERS[kind]()
    theirs = set(Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model)) & set(trainable_names(model))
    names = foam_parameter_names(model)
    ours = {*names.get("folded/decay", []), *names.get("plain/decay", [])}
    assert ours == theirs


def test_decay_rule_is_trainers_own_in_the_corners():
    from transformers import Trainer

    class Gate(nn.LayerNorm):  # a LayerNorm by inheritance, with a weight of two dimensions inside
        def __init__(self) -> None:
            super().__init__(4)
            self.inner = nn.Linear(4, 4)

    class Corners(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Linear(4, 4)
            self.normal = nn.Linear(4, 4)
            self.q_norm = nn.ModuleDict({"x": nn.Linear(4, 4)})
            self.gate = Gate()
            self.RMSNorm = nn.Linear(4, 4)
            self.shared_a = nn.ModuleList([nn.Linear(4, 4, bias=False)])
            self.shared_b = nn.ModuleList([self.shared_a[0]])
            self.Bias_table = nn.Parameter(torch.zeros(4, 4))

    for model in (Corners(), nn.LayerNorm(4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))):
        theirs = set(Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model)) & set(trainable_names(model))
        names = foam_parameter_names(model)
        assert {*names.get("folded/decay", []), *names.get("plain/decay", [])} == theirs


def test_given_decay_names_replace_the_rule():
    names = foam_parameter_names(tiny_models.tiny_mlp(), decay_parameter_names={"input.bias", "mixing", "not there"})
    assert names["folded/decay"] == ["mixing"]
    assert names["folded/no_decay"] == ["embedding.weight", "input.weight", "output.weight"]
    assert names["plain/decay"] == ["input.bias"]


def test_frozen_parameters_are_left_out():
    model = tiny_models.tiny_roberta()
    for name, p in model.named_parameters():
        p.requires_grad_("layer.1" in name or "classifier" in name)
    names = foam_parameter_names(model)
    assert sorted(name for members in names.values() for name in members) == sorted(trainable_names(model))
    assert len(names["folded/decay"]) == 6


def test_a_model_without_a_head_is_its_own_base_model():
    llama = tiny_models.tiny_llama()
    body = {name.removeprefix("model.") for name in expected_llama()["folded/decay"]} - {"lm_head.weight"}
    assert folded_names(llama.model) == body


def test_wrappers_are_looked_through():
    model = tiny_models.tiny_llama()
    for wrapped, prefix in ((torch.compile(model), "_orig_mod."), (nn.DataParallel(model), "module.")):
        names = foam_parameter_names(wrapped)
        expected = {group: {prefix + name for name in names} for group, names in expected_llama().items()}
        assert {group: set(members) for group, members in names.items()} == expected


def test_distributed_data_parallel_is_looked_through(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_models.tiny_lora_llama())
        assert folded_names(wrapped) == {"module." + name for name in expected_lora_llama()["folded/decay"]}
    finally:
        torch.distributed.destroy_process_group()


def test_attribute_base_model_of_a_users_own_class_counts():
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

    assert folded_names(Classifier()) == {"base_model.weight"}


def test_an_lm_head_inside_the_base_model_is_a_head_and_a_tied_one_is_an_embedding():
    t5 = tiny_models.tiny_t5()
    assert t5.base_model is t5
    assert folded_names(t5) - folded_names(t5, fold_head=False) == {"lm_head.weight"}
    qwen = tiny_models.tiny_qwen2()
    assert qwen.lm_head.weight is qwen.model.embed_tokens.weight
    assert "model.embed_tokens.weight" in folded_names(qwen, fold_head=False)
    assert "model.embed_tokens.weight" not in folded_names(qwen, fold_embeddings=False, fold_head=True)


def embedding_names(kind: str) -> set[str]:
    return {
        "roberta": {f"roberta.embeddings.{e}.weight" for e in ("word_embeddings", "token_type_embeddings")}
        | {"roberta.embeddings.position_embeddings.weight"},
        "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
        "t5": {"shared.weight"}
        | {f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")},
        "lora_llama": {f"base_model.model.model.embed_tokens.lora_embedding_{ab}.default" for ab in "AB"},
        "mlp": {"embedding.weight"},
    }.get(kind, {"model.embed_tokens.weight"})


def test_the_papers_setting_leaves_out_an_lm_head_and_embeddings(kind):
    model = tiny_models.BUILDERS[kind]()
    head = {"lm_head.weight"} if kind in ("llama", "mixtral", "t5") else set()
    everything = folded_names(model)
    assert everything - folded_names(model, fold_head=False) == head
    assert everything - folded_names(model, fold_embeddings=False) == embedding_names(kind)
    layers = everything - head - embedding_names(kind)
    assert folded_names(model, fold_embeddings=False, fold_head=False) == layers == layer_names(model)


def test_with_muon_embeddings_and_heads_are_tables_of_the_factored_rule(kind):
    model = tiny_models.BUILDERS[kind]()
    names = foam_parameter_names(model, second_moment="muon")
    head = {"lm_head.weight"} if kind in ("llama", "mixtral", "t5") else set()
    tables = {*names.get("table/decay", []), *names.get("table/no_decay", [])}
    assert tables == embedding_names(kind) | head
    assert folded_names(model, second_moment="muon") == layer_names(model)
    optimizer = FOAM(foam_param_groups(model, second_moment="muon", scale=0.5), second_moment="muon")
    found = {
        (group["second_moment"], group["level"], group["scale"])
        for group in optimizer.param_groups
        if {id(p) for p in group["params"]} & {id(p) for name, p in model.named_parameters() if name in tables}
    }
    assert found == {("factored", 8, 1.0)}
    plain = foam_parameter_names(model, second_moment="muon", fold_embeddings=False, fold_head=False)
    assert not [group for group in plain if group.startswith("table")]


def test_peft_trainable_tokens_are_embeddings_and_saved_copies_stay_plain():
    model = tiny_models.tiny_lora_llama(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4]})
    delta = [name for name in trainable_names(model) if "trainable_tokens_delta" in name]
    assert delta and set(delta) <= folded_names(model)
    assert not folded_names(model, fold_embeddings=False) & set(delta)
    model = tiny_models.tiny_lora_llama(target_modules=["q_proj"], modules_to_save=["embed_tokens", "down_proj"])
    copies = [name for name in trainable_names(model) if "modules_to_save" in name]
    assert len(copies) == 1 + tiny_models.LAYERS
    assert not folded_names(model, fold_embeddings=True) & set(copies)


def test_lora_adapter_added_to_a_transformers_model_folds():
    from peft import LoraConfig

    model = tiny_models.tiny_llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    layers = {f"model.layers.{i}.self_attn.q_proj.lora_{ab}.default.weight" for i in LAYERS for ab in "AB"}
    assert folded_names(model) == layers | {f"lm_head.lora_{ab}.default.weight" for ab in "AB"}
    assert folded_names(model, fold_head=False) == layers


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["self_attn.q_proj"]),
        (["model.layers.0.mlp.up_proj", "k_proj"], ["self_attn.k_proj", ("0", "mlp.up_proj")]),
        ([r".*\.[kv]_proj"], ["self_attn.k_proj", "self_attn.v_proj"]),
        (["mlp", "*not a regex but part of nothing"], [f"mlp.{name}" for name in MLP]),
        (r".*\.0\.self_attn\.[qk]_proj", [("0", "self_attn.q_proj"), ("0", "self_attn.k_proj")]),
        ("all-linear", [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP), "lm_head"]),
        ("all_linear", [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP), "lm_head"]),
        (["embed", "lm_head"], ["model.embed_tokens", "lm_head"]),
    ],
)
def test_target_modules_narrow(targets, expected):
    names = set()
    for entry in expected:
        layers, name = ([entry[0]], entry[1]) if isinstance(entry, tuple) else (LAYERS, entry)
        outside = name in ("lm_head", "model.embed_tokens")
        names |= {f"{name}.weight"} if outside else {f"model.layers.{i}.{name}.weight" for i in layers}
    model = tiny_models.tiny_llama()
    assert folded_names(model, target_modules=targets) == names
    groups = foam_parameter_names(model, target_modules=targets)
    assert sorted(name for members in groups.values() for name in members) == sorted(trainable_names(model))


@pytest.mark.parametrize(
    "targets", [["attn", "mlp"], "all-linear", r".*\.(q_proj|up_proj)", ["v_proj", r".*layers\.1\.mlp\..*"]]
)
def test_target_modules_choose_the_linear_layers_that_trainer_chooses(targets):
    from transformers.trainer_utils import check_target_module_exists

    model = tiny_models.tiny_llama()
    theirs = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (targets == "all-linear" or check_target_module_exists(targets, name))
    }
    assert folded_names(model, target_modules=targets) == theirs
    assert folded_names(model, target_modules=targets, fold_head=False) == theirs - {"lm_head.weight"}


def test_all_linear_leaves_free_parameters_and_takes_conv1d():
    assert folded_names(tiny_models.tiny_mlp(), target_modules="all-linear") == {"input.weight", "output.weight"}
    gpt2 = tiny_models.tiny_gpt2()
    tied = {"transformer.wte.weight"}  # its head is linear
    assert folded_names(gpt2, target_modules="all-linear") == layer_names(gpt2) | tied


def test_fused_experts_can_be_targeted():
    model = tiny_models.tiny_mixtral()
    experts = {name for name in expected_mixtral()["folded/decay"] if "experts" in name}
    assert folded_names(model, target_modules=["experts"]) == experts


def test_target_modules_do_not_undo_fold_embeddings():
    folded = folded_names(tiny_models.tiny_llama(), target_modules=["q_proj"], fold_embeddings=True)
    assert folded == {f"model.layers.{i}.self_attn.q_proj.weight" for i in LAYERS} | {"model.embed_tokens.weight"}
    only = folded_names(tiny_models.tiny_llama(), target_modules=["embed_tokens"], fold_embeddings=True)
    assert only == {"model.embed_tokens.weight"}


def test_no_match_lists_names_that_exist():
    with pytest.raises(ValueError, match=r"matches no weight that folds, got \['qproj'\]") as error:
        foam_param_groups(tiny_models.tiny_llama(), target_modules=["qproj"])
    assert "'model.layers.0.self_attn.q_proj'" in str(error.value)
    with pytest.raises(ValueError, match=r"expected names such as 'transformer\.h\.0\.attn\.c_attn'"):
        foam_param_groups(tiny_models.tiny_gpt2(), target_modules=r".*\.attention")
    with pytest.raises(ValueError, match=r"got 'q_proj'; .* expected '\.\*q_proj\.\*', or a list, \['q_proj'\]"):
        foam_param_groups(tiny_models.tiny_llama(), target_modules="q_proj")
    # The head exists, and is linear, but nothing of it would fold.
    with pytest.raises(ValueError, match=r"got \['lm_head'\]"):
        foam_param_groups(tiny_models.tiny_llama(), target_modules=["lm_head"], fold_head=False)
    with pytest.raises(ValueError, match=r"got \[\]"):
        foam_param_groups(tiny_models.tiny_llama(), target_modules=[])


def test_a_list_entry_without_a_match_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING, logger="foam_hf"):
        foam_param_groups(tiny_models.tiny_llama(), target_modules=["q_proj", "upproj"])
    assert "'upproj' matches no weight that folds" in caplog.text
    assert "model.layers.0.mlp.up_proj" in caplog.text
    assert "'q_proj' matches" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight_decay": -0.1}, ValueError, r"weight_decay is out of range: got -0\.1; expected"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay is out of range: got nan"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay is out of range: got inf"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay is not a number: got '0.1'"),
        ({"weight_decay": True}, TypeError, "weight_decay is not a number: got True"),
        ({"levle": 3}, TypeError, "got levle=3; did you mean 'level'"),
        ({"targets": ["q"]}, TypeError, "did you mean 'target_modules'"),
        ({"lr": 1e-3}, TypeError, "lr, betas and eps go to FOAM itself"),
        ({"target_modules": 3}, TypeError, "target_modules is neither a string nor a list of strings, got 3"),
        ({"target_modules": ["a", 3]}, TypeError, "target_modules is neither"),
        ({"target_modules": "*proj"}, ValueError, r"not a valid regular expression .* got '\*proj'"),
        (
            {"fold_embeddings": "false"},
            TypeError,
            "fold_embeddings is not a bool: got 'false'; expected True or False, or None",
        ),
        ({"fold_head": 1}, TypeError, "fold_head is not a bool: got 1"),
        ({"decay_parameter_names": "mixing"}, TypeError, "decay_parameter_names is one string"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        foam_param_groups(tiny_models.tiny_mlp(), **arguments)


def test_a_model_without_trainable_parameters():
    model = tiny_models.tiny_mlp().requires_grad_(False)
    with pytest.raises(
        ValueError, match="no trainable parameter, got TinyMLP with 8 frozen ones; expected at least one"
    ):
        foam_param_groups(model)
    with pytest.raises(ValueError, match="got Identity with 0 frozen ones"):
        foam_param_groups(nn.Identity())
    with pytest.raises(TypeError, match="not a torch.nn.Module, got list"):
        foam_param_groups(list(model.parameters()))


def test_needs_neither_transformers_nor_peft():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peft'] = None\n"
        "from torch import nn; from foam_hf.optimizer.groups import foam_param_groups\n"
        "print(len(foam_param_groups(nn.Linear(4, 4))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr


class Around(nn.Module):
    """A module of somebody's own around others, with a head of its own: a loss, a value head, a LightningModule."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(models)
        self.head = nn.Linear(32, 4)


def test_a_model_inside_another_module_folds_as_it_does_alone():
    for make in (tiny_models.tiny_roberta, tiny_models.tiny_llama, tiny_models.tiny_t5, tiny_models.tiny_lora_llama):
        for options in ({}, {"fold_head": False}, {"fold_embeddings": False}):
            expected = {f"inner.0.{name}" for name in folded_names(make(), **options)}
            assert folded_names(Around(make()), **options) == expected, (make, options)


def test_each_of_several_models_inside_has_its_own_head_and_a_shared_one_counts_once():
    roberta, llama = tiny_models.tiny_roberta(), tiny_models.tiny_llama()
    expected = {f"inner.0.{name}" for name in folded_names(roberta)}
    expected |= {f"inner.1.{name}" for name in folded_names(llama)}
    assert folded_names(Around(roberta, llama)) == expected
    assert folded_names(Around(roberta, Around(llama), roberta)) == {
        name.replace("inner.1.", "inner.1.inner.0.") for name in expected
    }


def test_what_is_trained_around_frozen_models_is_no_head_of_theirs():
    model = Around(tiny_models.tiny_roberta().requires_grad_(False))
    assert folded_names(model) == {"head.weight"}
    model.inner[0].classifier.requires_grad_(True)  # now that model is trained, as alone: its head
    assert folded_names(model) == set()
