"""Registration with transformers: names, pickles, JSON, the model card, what Trainer gets, every refusal."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import HfArgumentParser, Trainer, TrainingArguments, modelcard, trainer, training_args
from transformers.training_args import OptimizerNames

import foam_hf
from foam_hf import FOAM
from foam_hf.optim_args import FOAM_NAMES
from foam_hf.trainer import build, names, patches
from foam_hf.trainer.callback import OptimizerMemoryCallback
from foam_hf.trainer.refusals import refuse_sharding
from tests.support.tiny_models import classification_data, tiny_llama, tiny_roberta

pytestmark = [pytest.mark.long, pytest.mark.compat]

ROOT = Path(__file__).resolve().parents[2]


def make_args(tmp_path: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(tmp_path),
        "optim": "foam",
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
    }
    return TrainingArguments(**{**defaults, **settings})


def make_trainer(tmp_path: Path, trainer_class: type[Trainer] = Trainer, **settings: Any) -> Trainer:
    args = make_args(tmp_path, **{"max_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True, **settings})
    return trainer_class(model=tiny_roberta(), args=args, train_dataset=classification_data(8))


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "USE_TF": "0"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


# names


def test_import_is_cheap_and_names_are_lazy() -> None:
    code = (
        "import sys, foam_hf\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert {'FOAM', 'foam_param_groups', 'OptimizerMemoryCallback', '__version__'} <= set(dir(foam_hf))\n"
        "from foam_hf import FOAM\n"
        "assert 'transformers' not in sys.modules\n"
        "import foam_hf.optimizer, pickle\n"
        "assert foam_hf.FOAM is FOAM is foam_hf.optimizer.FOAM and foam_hf.memory.format_bytes\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'FAOM'"):
        foam_hf.FAOM  # noqa: B018


def test_names_are_real_members_of_the_enum() -> None:
    for value in FOAM_NAMES:
        member = OptimizerNames(value)
        assert member is OptimizerNames[value.upper()] is getattr(OptimizerNames, value.upper())
        assert isinstance(member, OptimizerNames) and member == value and member.value == value
        assert member in list(OptimizerNames) and str(member) == f"OptimizerNames.{value.upper()}"
    assert len(set(OptimizerNames)) == len(OptimizerNames)


def test_command_line_parser_offers_the_names(tmp_path: Path) -> None:
    command = ["--output_dir", str(tmp_path), "--optim", "foam_mini", "--optim_args", "scale=0.5"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(command)
    assert args.optim is OptimizerNames.FOAM_MINI and args.optim_args == "scale=0.5"
    assert "foam" in HfArgumentParser(TrainingArguments).format_help()


def test_registering_again_changes_nothing() -> None:
    before = list(OptimizerNames), Trainer.train, Trainer.get_optimizer_cls_and_kwargs, TrainingArguments.__post_init__
    importlib.reload(foam_hf)
    names.register_names(training_args)
    for module in (training_args, trainer, modelcard):
        patches.patch(module)
    assert before == (
        list(OptimizerNames),
        Trainer.train,
        Trainer.get_optimizer_cls_and_kwargs,
        TrainingArguments.__post_init__,
    )


def test_wrapped_methods_keep_their_names_and_signatures() -> None:
    assert Trainer.train.__name__ == "train" and Trainer.train.__doc__ == Trainer.train.__wrapped__.__doc__
    assert Trainer.get_optimizer_cls_and_kwargs.__module__ == "transformers.trainer"


def test_name_that_transformers_ships_stays_theirs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OptimizerNames(str, Enum):
        FOAM = "foam"

    class TrainingArguments:
        def __post_init__(self) -> None:
            pass

    module = types.ModuleType("transformers.training_args")
    module.OptimizerNames, module.TrainingArguments = OptimizerNames, TrainingArguments  # type: ignore[attr-defined]
    theirs = OptimizerNames.FOAM
    monkeypatch.setattr(names, "_registered", set())
    with caplog.at_level(logging.WARNING, "foam_hf"):
        names.register_names(module)
    assert OptimizerNames.FOAM is theirs and OptimizerNames("foam_mini") == "foam_mini"
    assert names._registered == set(FOAM_NAMES) - {"foam"}
    assert [record.getMessage().startswith("transformers has its own optim='foam'") for record in caplog.records] == [
        True
    ]
    args = types.SimpleNamespace(optim=theirs)
    assert build.wrap_get_optimizer(lambda args, model: "theirs").__func__(args, None) == "theirs"


def test_transformers_without_a_needed_name_is_an_error_that_names_it() -> None:
    with pytest.raises(ImportError, match=r"cannot register with transformers .*Trainer has no get_optimizer_cls"):
        module = types.SimpleNamespace(__name__="transformers.trainer", Trainer=type("Trainer", (), {}))
        patches.patch(module)  # type: ignore[arg-type]


# args as data


def test_pickles_of_earlier_versions_find_the_name() -> None:
    """A training_args.bin of version 0.2 calls a function of a module that has gone since."""
    assert pickle.loads(b"cfoam_hf.trainer_plugin\noptimizer_name\n(Vfoam_mini\ntR.") is OptimizerNames.FOAM_MINI


def test_arguments_copy_pickle_and_serialise(tmp_path: Path) -> None:
    args = make_args(tmp_path, optim_args="level=4")
    for twin in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert twin.optim is OptimizerNames.FOAM and twin.optim_args == "level=4"
    assert pickle._loads(pickle._dumps(args.optim)) is args.optim  # type: ignore[attr-defined]
    assert json.loads(args.to_json_string())["optim"] == args.to_dict()["optim"] == "foam"
    assert args.to_sanitized_dict()["optim"] == "foam"


def test_training_args_bin_loads_where_foam_hf_was_never_imported(tmp_path: Path) -> None:
    torch.save(make_args(tmp_path), tmp_path / "training_args.bin")
    code = (
        "import sys, torch, transformers.training_args as t\n"
        "assert 'foam_hf' not in sys.modules and 'FOAM' not in t.OptimizerNames.__members__\n"
        "args = torch.load(sys.argv[1], weights_only=False)\n"
        "assert args.optim is t.OptimizerNames.FOAM, args.optim\n"
        "from transformers import Trainer\n"  # imported after foam_hf
        "assert Trainer.train.__module__ == 'transformers.trainer' and hasattr(Trainer.train, '_foam_hf')\n"
    )
    done = python(code, str(tmp_path / "training_args.bin"))
    assert done.returncode == 0, done.stderr


# what Trainer receives


def test_handler_returns_foam_with_trainers_settings(tmp_path: Path) -> None:
    args = make_args(
        tmp_path,
        learning_rate=3e-4,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        seed=7,
        optim_args="level=4,scale=0.5,second_moment=factored,residual_scale=0.7,stochastic_rounding=false,state_dtype=bf16",
    )
    model = tiny_roberta()
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert optimizer_class is FOAM
    decided = kwargs.pop("decided")
    assert kwargs == {
        "lr": 3e-4,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "level": 4,
        "scale": 0.5,
        "second_moment": "factored",
        "residual_scale": 0.7,
        "stochastic_rounding": False,
        "state_dtype": torch.bfloat16,
        "seed": 7,
    }
    optimizer = FOAM(decided.groups, **kwargs)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    names = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert decayed == {id(p) for name, p in model.named_parameters() if name in names}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {group["level"] for group in optimizer.param_groups} == {0, 4}


def test_foam_mini_folds_whole_rows_and_refuses_another_level(tmp_path: Path) -> None:
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, optim="foam_mini"), tiny_roberta())
    assert kwargs["level"] == "row"
    Trainer.get_optimizer_cls_and_kwargs(
        make_args(tmp_path, optim="foam_mini", optim_args="level=row"), tiny_roberta()
    )
    with pytest.raises(ValueError, match="level=4 contradicts optim='foam_mini'"):
        make_args(tmp_path, optim="foam_mini", optim_args="level=4")


def test_embeddings_and_target_modules_are_handed_on(tmp_path: Path) -> None:
    def folded(**settings: Any) -> int:
        _, kwargs = Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, **settings), tiny_roberta())
        return sum(p.numel() for group in kwargs["decided"].groups if group.get("level") != 0 for p in group["params"])

    assert folded() > folded(optim_args="fold_embeddings=false") > folded(optim_target_modules=["query"]) > 0
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, optim_args="fold_head=true"), tiny_llama())
    assert [p.shape for group in kwargs["decided"].groups if group.get("level") != 0 for p in group["params"]][-1] == (
        64,
        32,
    )
    with pytest.raises(ValueError, match="no_such_module"):
        folded(optim_target_modules=["no_such_module"])


def test_foam_muon_has_the_settings_of_the_rest_for_adamw(tmp_path: Path) -> None:
    args = make_args(tmp_path, optim="foam_muon", adam_beta1=0.8, optim_args="momentum=0.9,level=2")
    model = tiny_roberta()
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = cls(model.parameters(), **kwargs)
    rules = {(group["second_moment"], group["level"]) for group in optimizer.param_groups}
    assert rules == {("muon", 2), ("factored", 2), ("block", 0)}
    assert {(group["momentum"], group["betas"]) for group in optimizer.param_groups} == {(0.9, (0.8, 0.999))}
    for wrong in ("second_moment=factored", "momentum=2"):
        with pytest.raises(ValueError, match="optim_args"):
            make_args(tmp_path, optim="foam_muon", optim_args=wrong)


def test_foam_adam_mini_knows_the_heads_of_the_model(tmp_path: Path) -> None:
    args = make_args(tmp_path, optim="foam_adam_mini", weight_decay=0.1)
    model = tiny_llama()
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = cls(model.parameters(), **kwargs)
    rules = {(group["level"], group["mini_rows"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rules == {(8, 8, 0.1), (8, 1, 0.1), (0, 0, 0.0)}
    with pytest.raises(ValueError, match="second_moment=factored contradicts optim='foam_adam_mini'"):
        make_args(tmp_path, optim="foam_adam_mini", optim_args="second_moment=factored")


def test_seed_of_the_rounding_can_differ_from_the_seed_of_the_run(tmp_path: Path) -> None:
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, optim_args="seed=5"), tiny_roberta())
    assert kwargs["seed"] == 5


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, optim="adamw_torch"))
    assert optimizer_class is torch.optim.AdamW and "params" not in kwargs


def test_handler_without_a_model_says_that_it_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decides by the model which weights fold"):
        Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path))


def test_bad_optim_args_fail_before_a_model_exists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'lvl'. Did you mean 'level'"):
        make_args(tmp_path, optim_args="lvl=8")
    make_args(tmp_path, optim="adamw_torch", optim_args="lvl=8")  # not ours to judge


def test_arguments_changed_later_are_checked_when_training_starts(tmp_path: Path) -> None:
    run = make_trainer(tmp_path)
    run.args.optim_args = "level=99"
    with pytest.raises(ValueError, match="level must be an integer from 0 to 16, or row, got '99'"):
        run.train()
    assert run.state.global_step == 0


def test_one_summary_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "foam_hf"):
        Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path), tiny_roberta())
    (record,) = [record for record in caplog.records if record.name.startswith("foam_hf")]
    assert record.levelno == logging.INFO and re.search(r"level\W+8", record.getMessage())


def test_a_run_says_once_what_it_gains(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = r"FOAM: [\d.]+ kB of optimizer state, [\d.]+% of AdamW's [\d.]+ kB, for [\d,]+ trained parameters\n"
    run = make_trainer(tmp_path)
    run.train()
    run.create_optimizer()
    run.optimizer = None
    run.train()
    out, err = capfd.readouterr()
    assert len(re.findall(line, err)) == 1 and "FOAM" not in out
    make_trainer(tmp_path).train()
    assert len(re.findall(line, capfd.readouterr().err)) == 1, "a second run says it too"
    make_trainer(tmp_path, log_level="error").train()
    make_trainer(tmp_path, optim="adamw_torch").train()
    assert "FOAM" not in capfd.readouterr().err


def test_model_of_which_nothing_folds_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_roberta()
    with caplog.at_level(logging.WARNING, "foam_hf"):
        Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, optim_args="level=0"), model)
        assert not caplog.records
        model.roberta.requires_grad_(False)
        Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path), model)
    (record,) = caplog.records
    assert "no trainable weight of RobertaForSequenceClassification folds" in record.getMessage()


def test_decay_names_of_a_trainer_subclass_are_honoured(tmp_path: Path) -> None:
    class NoDecay(Trainer):
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return []

    run = make_trainer(tmp_path, NoDecay, weight_decay=0.1)
    run.train()
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0}


def test_subclass_that_overrides_and_calls_super_trains(tmp_path: Path) -> None:
    class Custom(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.created = super().create_optimizer(*args, **kwargs)
            return self.created

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "custom": 1.0}, *args, **kwargs)

    run = make_trainer(tmp_path, Custom)
    run.train()
    assert isinstance(run.created, FOAM) and run.state.log_history[-1]["custom"] == 1.0


# the callback


def test_training_binds_the_trainer_to_a_memory_callback(tmp_path: Path) -> None:
    run = make_trainer(tmp_path)
    callback = OptimizerMemoryCallback()
    run.add_callback(callback)
    run.train()
    assert callback.trainer is not None and any("optim/state_bytes" in entry for entry in run.state.log_history)


@pytest.mark.parametrize("already_there", [False, True])
def test_environment_variable_adds_one_memory_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, already_there: bool
) -> None:
    monkeypatch.setenv("FOAM_HF_REPORT_MEMORY", "1")
    run = make_trainer(tmp_path, optim="adamw_torch")
    if already_there:
        run.add_callback(OptimizerMemoryCallback())
    run.train()
    run.train()
    found = [callback for callback in run.callback_handler.callbacks if isinstance(callback, OptimizerMemoryCallback)]
    assert len(found) == 1


# the model card


def test_model_card_names_the_optimizer_with_effective_arguments(tmp_path: Path) -> None:
    run = make_trainer(tmp_path, adam_beta2=0.95, optim_args="scale=0.5")
    run.train()
    run.create_model_card(model_name="tiny")
    (line,) = [text for text in (tmp_path / "README.md").read_text().splitlines() if "optimizer" in text]
    for fragment in (
        "Use foam (",
        "betas=(0.9,0.95)",
        "epsilon=1e-08",
        "level=8",
        "scale=0.5",
        "second_moment=block",
        "stochastic_rounding=auto",
        "state_dtype=float32",
        "seed=42",
    ):
        assert fragment in line


def test_model_card_of_another_optimizer_is_untouched(tmp_path: Path) -> None:
    run = make_trainer(tmp_path, optim="adamw_torch")
    assert modelcard.extract_hyperparameters_from_trainer(run) == (
        modelcard.extract_hyperparameters_from_trainer.__wrapped__(run)
    )


# refusals


def sharded(**attributes: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(parameters=list, **attributes)


def with_fsdp(**plugin: Any) -> types.SimpleNamespace:
    state = types.SimpleNamespace(fsdp_plugin=types.SimpleNamespace(**plugin))
    return types.SimpleNamespace(is_fsdp_enabled=True, accelerator=types.SimpleNamespace(state=state))


@pytest.mark.parametrize(
    ("found", "args", "model", "run"),
    [
        ("FSDP version 1", {"fsdp": True, "fsdp_config": {"version": 1}}, None, None),
        ("FSDP of torch_xla", {"fsdp": True, "fsdp_config": {"xla": True}}, None, None),
        ("FSDP version 1", {}, None, with_fsdp(fsdp_version=1)),
        (f"FSDP of accelerate {accelerate.__version__}, which knows version 1 alone", {}, None, with_fsdp()),
        (
            "FSDP where accelerate does not set it up",
            {},
            None,
            types.SimpleNamespace(
                is_fsdp_enabled=True, accelerator=types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=None))
            ),
        ),
        ("tensor parallelism", {"parallelism_config": types.SimpleNamespace(tp_size=2)}, None, None),
        ("tensor parallelism", {}, sharded(tp_size=2), None),
        (
            "expert parallelism",
            {},
            sharded(config=types.SimpleNamespace(distributed_config=types.SimpleNamespace(ep_size=2))),
            None,
        ),
        (
            "expert parallelism",
            {},
            sharded(
                tp_size=2,
                config=types.SimpleNamespace(distributed_config=types.SimpleNamespace(enable_expert_parallel=True)),
            ),
            None,
        ),
        (
            "a model sharded before the Trainer got it",
            {},
            types.SimpleNamespace(parameters=lambda: [types.SimpleNamespace(device_mesh=None)]),
            None,
        ),
    ],
)
def test_sharded_training_is_refused_with_what_works(found: str, args: dict[str, Any], model: Any, run: Any) -> None:
    namespace = types.SimpleNamespace(optim=OptimizerNames.FOAM, **args)
    with pytest.raises(ValueError) as caught:
        refuse_sharding(namespace, model, run)
    assert found in str(caught.value) and "What works: one GPU, or several with DDP" in str(caught.value)


FSDP2 = with_fsdp(fsdp_version=2)


def test_launcher_that_shards_is_refused_at_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="What works: one GPU"):
        make_args(tmp_path)


@pytest.mark.parametrize(
    ("message", "options", "plugin"),
    [
        ("second_moment=adam_mini needs whole weights", {"optim": OptimizerNames.FOAM_ADAM_MINI}, {}),
        ("plain_state=8bit needs whole weights", {"optim_args": "plain_state=8bit"}, {}),
        ("got fsdp_offload_params: true", {}, {"cpu_offload": CPUOffloadPolicy(pin_memory=False)}),
    ],
)
def test_what_fsdp2_cannot_be_combined_with_is_refused(
    message: str, options: dict[str, Any], plugin: dict[str, Any]
) -> None:
    args = types.SimpleNamespace(**{"optim": OptimizerNames.FOAM, "optim_args": None, **options})
    refuse_sharding(types.SimpleNamespace(optim=OptimizerNames.FOAM, optim_args=None), None, FSDP2)
    with pytest.raises(ValueError, match=message):
        refuse_sharding(args, None, with_fsdp(fsdp_version=2, **plugin))


def test_sharding_arguments_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="What works: one GPU"):
        make_args(tmp_path, fsdp="full_shard", fsdp_config={"version": 1})


def test_sagemaker_model_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_sagemaker_mp_enabled", lambda: True)
    with pytest.raises(ValueError, match="SageMaker model parallelism"):
        refuse_sharding(types.SimpleNamespace(optim=OptimizerNames.FOAM))


def test_training_refuses_before_the_first_step(tmp_path: Path) -> None:
    run = make_trainer(tmp_path)
    run.is_fsdp_enabled = True
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(ValueError, match="FSDP"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(p, q) for p, q in zip(before, run.model.parameters(), strict=True))


# wrong moves of a new user


@pytest.mark.parametrize(
    ("given", "meant"), [("FOAM", "foam"), ("Foam-Mini", "foam_mini"), ("foam-muon", "foam_muon")]
)
def test_a_misspelt_name_is_told_what_was_meant(tmp_path: Path, given: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"optim='{given}' is no optimizer of the Trainer; did you mean '{meant}'"):
        make_args(tmp_path, optim=given)


def test_the_summary_is_printed_for_foam_hf_run(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path).create_optimizer()
    assert "FOAM: folded (level" not in capsys.readouterr().err
    monkeypatch.setenv("FOAM_HF_SUMMARY", "1")
    make_trainer(tmp_path).create_optimizer()
    assert capsys.readouterr().err.count("of state in all") == 1
