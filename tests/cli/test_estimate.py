"""`foam-hf estimate`: what it prints, draws and returns, for models that fit, do not fit, or do not exist."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest

from foam_hf import estimate_memory
from foam_hf.cli import main
from foam_hf.cli.estimate_options import COMPARED, COMPARED_IF_SHARED, chosen_optimizers, size_in_bytes
from foam_hf.memory import format_bytes
from foam_hf.planner.counting import OPTIMIZERS
from tests.support import tiny_models

pytestmark = pytest.mark.long

SMALL = ["--batch", "2", "--seq", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with nothing but a config."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_models.tiny_llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def without_progress(err: str) -> str:
    """Standard error without the line that says that something is going on."""
    return "".join(line for line in err.splitlines(True) if not line.endswith(" in about ten seconds ...\n"))


@pytest.fixture
def estimate(capsys):
    """Run `foam-hf estimate` with these arguments; its exit code, and what it wrote to stdout and to stderr."""

    def run(*arguments):
        code = main(["estimate", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, without_progress(err)

    return run


def plans(output: str) -> list[dict]:
    return json.loads(output)["plans"]


def cells(output: str) -> list[list[str]]:
    """The rows of the table, as cells."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("───"))
    rows = lines[start + 1 : lines.index("", start)]
    return [re.split(r"\s{2,}", row.strip()) for row in rows]


# --- The table ---


def test_the_table_has_every_compared_optimizer_sorted_by_what_it_takes(estimate, model):
    code, out, err = estimate(model, *SMALL)
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM, 19,616 parameters in float32" in out
    assert "a training step of 2 x 16 tokens" in out
    rows = cells(out)
    assert {row[0] for row in rows} == set(COMPARED.split(", "))
    known = {name: estimate_memory(model, name, batch=2, sequence=16) for name in COMPARED.split(", ")}
    for name, *sizes in rows:
        plan = known[name]
        expected = [plan.weights, plan.gradients, plan.state, plan.activations, plan.total]
        assert sizes == [format_bytes(size) for size in expected]
    assert [known[row[0]].total for row in rows] == sorted(plan.total for plan in known.values())
    assert "counted to the byte" in out and "an estimate: " in out


def test_the_table_is_never_cut_off(model, capsys, monkeypatch):
    """Whatever is said of the terminal's width: half a number is none."""
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["estimate", model, *SMALL, "--gpu", "1GB"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("foam-hf estimate: planning ") and without_progress(err) == ""
    assert "adamw_torch_fused" in out and "…" not in out
    assert "\x1b" not in out, "colours are for terminals"
    assert all(len(row) == 8 for row in cells(out))


def test_levels_make_rows_and_options_go_where_they_are_known(estimate, model):
    code, out, _ = estimate(
        model,
        *SMALL,
        "--optim",
        "foam,adafactor",
        "--optim",
        "galore_adamw",
        "--level",
        "2,row",
        "--optim-args",
        "rank=4",
    )
    assert code == 0
    assert {row[0] for row in cells(out)} == {
        "foam (level=2)",
        "foam (level=row)",
        "adafactor",
        "galore_adamw (rank=4)",
    }


def test_options_of_the_step_are_named_and_counted(estimate, model):
    flags = ["--bf16", "--gradient-checkpointing", "--attention", "eager", "--gradient-accumulation"]
    code, out, _ = estimate(model, *SMALL, "--optim", "foam", "--json", *flags, "--dtype", "fp32")
    assert code == 0
    settings = {"autocast": "bfloat16", "gradient_checkpointing": True, "attention": "eager", "accumulation": True}
    assert plans(out)[0]["total"] == estimate_memory(model, batch=2, sequence=16, **settings).total
    _, out, _ = estimate(model, *SMALL, *flags)
    assert "of 2 x 16 tokens, bf16 autocast, eager attention, gradient checkpointing, gradients accumulated:" in out


def test_what_only_foam_has_is_said(estimate, model):
    code, out, _ = estimate(model, *SMALL, "--optim", "foam,adamw_torch", "--gradient-release")
    assert code == 0
    assert {row[0] for row in cells(out)} == {"foam (gradient release)", "adamw_torch"}
    assert "Only FOAM has gradient release: the other optimizers are planned without." in out


def test_where_every_weight_fits_adapters_are_named_as_the_other_choice(estimate, model):
    said = "so can LoRA adapters (--lora-rank 16 plans them)"
    assert said in estimate(model, *SMALL, "--gpu", "1GB", "--optim", "foam,adamw_torch")[1]
    for flags in (["1GB", "--lora-rank", "4"], ["1GB", "--int8-weights"], ["1KB"]):
        assert said not in estimate(model, *SMALL, "--optim", "foam", "--gpu", *flags)[1]
    assert said not in estimate(model, *SMALL, "--optim", "foam")[1]


def test_adapters_instead_of_weights(estimate, model):
    code, out, _ = estimate(model, *SMALL, "--optim", "foam", "--lora-rank", "4", "--json")
    assert code == 0
    plan = estimate_memory(model, lora_rank=4, batch=2, sequence=16)
    assert plans(out)[0]["state"] == plan.state and plans(out)[0]["trainable"] == plan.trainable
    assert "LoRA of rank 4 on all linear layers" in estimate(model, *SMALL, "--lora-rank", "4")[1]


# --- Several GPUs under DeepSpeed's ZeRO ---


def test_zero_is_planned_for_each_gpu_and_its_parts_are_columns(estimate, model):
    code, out, err = estimate(model, *SMALL, "--zero", 2, "--gpus", 4)
    assert (code, err) == (0, "")
    assert "a training step of 2 x 16 tokens, ZeRO-2 on 4 GPUs, on each GPU:" in out
    kinds = ["weights", "masters", "gradients", "state", "buffers", "activations", "total"]
    assert ["optimizer", *kinds] in [line.split() for line in out.splitlines()]
    assert {row[0] for row in cells(out)} == set(COMPARED_IF_SHARED.split(", "))
    plan = estimate_memory(model, batch=2, sequence=16, zero=2, gpus=4)
    row = next(row for row in cells(out) if row[0] == "foam")
    assert row[1:] == [format_bytes(getattr(plan, kind)) for kind in kinds]
    assert "buckets of 500,000,000 elements" in out


def test_a_deepspeed_config_with_offload_names_host_memory_and_what_is_not_planned(estimate, model, tmp_path):
    path = tmp_path / "ds_z3_offload_config.json"
    section = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": section}))
    code, out, _ = estimate(model, *SMALL, "--zero", path, "--gpus", 2, "--optim", "foam", "--bf16")
    assert code == 0
    assert "ZeRO-3 on 2 GPUs, optimizer in host memory" in out and "autocast" not in out
    assert "host memory" in out.splitlines()[out.splitlines().index("") + 1]
    assert "Not in the plan, though it changes the memory: offload_param of the config." in out
    assert "parameters in bfloat16" in out, "DeepSpeed casts the model"
    _, out, _ = estimate(model, *SMALL, "--zero", 3, "--offload", "--gpus", 2, "--optim", "foam", "--json")
    assert plans(out)[0]["host"] > 0 and plans(out)[0]["zero"] == "ZeRO-3 on 2 GPUs, optimizer in host memory"


def test_nothing_fits_under_zero_and_only_what_runs_there_is_tried(estimate):
    code, out, _ = estimate("llama-60m", "--seq", 8, "--gpu", "10MB", "--optim", "foam", "--zero", 3, "--gpus", 2)
    assert code == 1
    assert "foam_mini with --gradient-checkpointing and a batch of 1 would still take" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "4"], "--gpus is for models that are divided; expected --fsdp2, or --zero 1, 2 or 3, with it."),
        (["--offload", "--optim", "adamw_torch"], "--offload is FOAM's, and it is not among the optimizers"),
        (["--offload", "--fsdp2", "--gpus", "2"], "--offload excludes --fsdp2"),
        (["--zero", "2"], "their number is not given: --gpus 2"),
        (["--zero", ""], "--zero: no stage, got ''; expected 1, 2, 3"),
        (["--zero", "5", "--gpus", "2"], "zero is no stage, got '5'"),
        (["--zero", "2", "--gpus", "two"], "--gpus: not a count, 'two'"),
        (["--zero", "2", "--gpus", "2", "--gradient-release"], "--gradient-release does not run under --zero 2"),
        (["--zero", "2", "--gpus", "2", "--optim", "apollo_adamw"], "needs whole matrices, which ZeRO flattens"),
    ],
)
def test_what_zero_lacks_or_excludes_is_one_line(estimate, model, arguments, message):
    code, out, err = estimate(model, *SMALL, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


# --- Does it fit? ---


def test_a_card_that_is_large_enough(estimate, model):
    code, out, _ = estimate(model, *SMALL, "--gpu", "1GB", "--optim", "foam,adamw_torch")
    assert code == 0
    assert [row[-2] for row in cells(out)] == ["yes", "yes"]
    assert all(int(row[-1]) > 2 for row in cells(out))
    assert "Nothing fits" not in out


def test_nothing_fits_and_a_smaller_batch_would(estimate, model):
    limit = estimate_memory(model, batch=100, sequence=64).total
    code, out, _ = estimate(model, "--batch", 200, "--seq", 64, "--gpu", f"{limit / 1000:.0f}kB", "--optim", "foam")
    assert code == 1
    assert cells(out)[0][-2:] == ["no", "100"] or cells(out)[0][-2:] == ["no", "99"]  # the size is rounded
    assert re.search(r"^Nothing fits in .*: foam comes nearest", out, re.MULTILINE)
    assert re.search(r"^With --batch (99|100) would fit: foam\.$", out, re.MULTILINE)
    assert "and a batch of" not in out, "no switch makes room for 200"


def test_the_batch_that_was_asked_for_fits_with_checkpointing(estimate):
    sizes = ("llama-60m", "--batch", 16, "--seq", 256)
    checkpointed = estimate_memory("llama-60m", batch=16, sequence=256, gradient_checkpointing=True).total
    whole = estimate_memory("llama-60m", batch=16, sequence=256).total
    gpu = f"{(checkpointed + whole) // 2 / 1e6:.0f}MB"
    code, out, _ = estimate(*sizes, "--gpu", gpu, "--optim", "foam,adamw_torch")
    assert code == 0
    assert re.search(r"^As asked, nothing fits in .*\nWith --batch \d+ would fit: ", out, re.MULTILINE)
    assert f"foam with --gradient-checkpointing and a batch of 16 takes {format_bytes(checkpointed)}." in out
    assert "optim='foam', per_device_train_batch_size=16, gradient_checkpointing=True)" in out
    code, again, _ = estimate(*out.rstrip().splitlines()[-1].split()[2:])
    assert code == 0 and cells(again)[0][-2] == "yes", "the command that is printed plans what it says"


def test_nothing_fits_and_the_fewest_switches_that_help_are_named(estimate):
    with_release = estimate_memory("llama-60m", gradient_release=True, sequence=8).total
    without = estimate_memory("llama-60m", sequence=8).total
    between = (with_release + without) // 2
    code, out, err = estimate("llama-60m", "--seq", 8, "--gpu", f"{between / 1e6:.0f}MB", "--optim", "adamw_torch")
    assert (code, err) == (0, "")
    assert cells(out)[0][-2:] == ["no", "none"]
    assert "As asked, nothing fits in" in out
    assert f"foam with --gradient-release and a batch of 1 takes {format_bytes(with_release)}." in out
    assert "args = TrainingArguments(..., optim='foam', optim_args='gradient_release=true', " in out
    command = out.rstrip().splitlines()[-1].split()
    assert command[:3] == ["foam-hf", "estimate", "llama-60m"]
    code, out, _ = estimate(*command[2:])
    assert code == 0 and cells(out)[0][-2] == "yes", "the command that is printed plans what it says"
    code, out, _ = estimate("llama-60m", "--seq", 8, "--gpu", "100MB", "--optim", "foam")
    assert code == 1
    assert re.search(r"^foam_mini with --.* and a batch of 1 would still take ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("asked", "by_rows"),
    [
        (("foam", ""), ("foam_mini", "")),
        (("foam", "level=2,nonfinite=skip"), ("foam_mini", "nonfinite=skip")),
        (("foam", "second_moment=factored,level=8"), ("foam", "second_moment=factored,level=row")),
        (("foam_adam_mini", ""), ("foam_adam_mini", "level=row")),
    ],
    ids=lambda each: ", ".join(filter(None, each)),
)
def test_a_row_as_block_is_tried_before_a_further_switch(estimate, asked, by_rows):
    """The state of the same rule by rows is less, and costs no time."""
    totals = [estimate_memory("llama-60m", *each, sequence=8).total for each in (asked, by_rows)]
    gpu = f"{sum(totals) // 2000}kB"
    options = ["--optim-args", asked[1]] if asked[1] else []
    code, out, _ = estimate("llama-60m", "--seq", 8, "--gpu", gpu, "--optim", asked[0], *options)
    assert code == 0 and totals[1] < totals[0]
    named = by_rows[0] + (f" ({by_rows[1]})" if by_rows[1] else "")
    assert f"\n{named} with a batch of 1 takes {format_bytes(totals[1])}." in out
    code, again, _ = estimate(*out.rstrip().splitlines()[-1].split()[2:])
    assert code == 0 and cells(again)[0][-2] == "yes", "the command that is printed plans what it says"


def test_foam_itself_is_the_way_out_where_only_others_were_planned(estimate):
    foam, adamw = (estimate_memory("llama-60m", name, sequence=8).total for name in ("foam", "adamw_torch"))
    gpu = f"{(foam + adamw) // 2e6:.0f}MB"
    code, out, _ = estimate("llama-60m", "--seq", 8, "--gpu", gpu, "--optim", "adamw_torch")
    assert code == 0
    assert f"\nfoam with a batch of 1 takes {format_bytes(foam)}." in out


def test_a_program_reads_the_same_numbers(estimate, model):
    code, out, err = estimate(model, *SMALL, "--json", "--gpu", "1MB", "--level", "2")
    assert (code, err) == (1, "")
    document = json.loads(out)
    assert document["model"] == model and document["gpu"] == 1_000_000
    for row in document["plans"]:
        assert row["total"] == sum(row[kind] for kind in ("weights", "gradients", "state", "activations"))
        assert (row["fits"], row["largest_batch"]) == (False, 0)
    assert [row["options"] for row in document["plans"] if row["optim"] == "foam"] == ["level=2"]
    assert document["way_out"]["fits"] is False and "gradient_release" in document["way_out"]["switches"]
    assert plans(estimate(model, *SMALL, "--json")[1])[0]["fits"] is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("16GiB", 16 * 2**30),
        ("0.5TB", 5 * 10**11),
        ("1.5MiB", 3 * 2**19),
        ("800kB", 800_000),
        ("512B", 512),
    ],
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


# --- The picture ---


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_picture_is_drawn_beside_the_table(estimate, model, tmp_path, suffix):
    path = tmp_path / f"plan.{suffix}"
    code, out, err = estimate(model, *SMALL, "--plot", path, "--gpu", "1GB", "--gradient-release")
    assert (code, err) == (0, "")
    assert cells(out)
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
    if suffix == "png":
        from matplotlib.image import imread

        image = imread(path)
        assert image.shape[1] == 1050, "a paper's column of 3.5 inches at 300 dots"
        assert (image[0, 0, :3] == 1).all() and (image[..., 3] == 1).all(), "white on dark pages too"


# --- What cannot be planned: one line, exit code 2 ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model/at/all"], "no such file or folder: no/such/model/at/all"),
        (["llama-60n.json"], "no such file or folder: llama-60n.json"),
        (["llama-60m", "--gpu", "24"], "--gpu: no unit in '24'; expected something like 24GB"),
        (["llama-60m", "--gpu", "lots"], "--gpu: not a size, 'lots'"),
        (["llama-60m", "--gpu=-3GB"], "--gpu: not a size, '-3GB'"),
        (["llama-60m", "--gpu", "0GB"], "--gpu: no memory at all, '0GB'"),
        (["llama-60m", "--batch", "0"], "--batch: not a count, '0'; expected an integer of 1 or more"),
        (["llama-60m", "--batch", "two"], "--batch: not a count, 'two'"),
        (["llama-60m", "--seq", "1.5"], "--seq: not a count, '1.5'"),
        (["llama-60m", "--lora-rank", "-1"], "--lora-rank: not a count, '-1'"),
        (["roberta-base", "--seq", "513"], "got sequences of 513; expected --seq 512 or less"),
        (["llama-60m", "--optim", "adam"], "unknown optimizer 'adam'; did you mean 'adam_mini'"),
        (["llama-60m", "--optim", "foam,foam"], "--optim has 'foam' twice"),
        (["llama-60m", "--optim", "adafactor", "--level", "2"], "--level is FOAM's, and none of adafactor has it"),
        (["llama-60m", "--level", "2", "--optim-args", "level=8"], "the level is given twice"),
        (["llama-60m", "--level", "8,2, 8"], "--level has 8 twice, got 8,2, 8; expected levels that differ"),
        (["llama-60m", "--optim-args", "level=2,level=5"], "'level' is given twice, in 'level=2,level=5'"),
        (["llama-60m", "--level", "99"], "level must be an integer from 0 to 16, or row, got '99'"),
        (["llama-60m", "--optim-args", "levle=8"], "has 'levle'; they have"),
        (["llama-60m", "--optim-args", "level"], "is not of the form key=value"),
        (["llama-60m", "--optim", "adamw_torch", "--int8-weights"], "--int8-weights is FOAM's"),
        (
            ["llama-60m", "--gradient-release", "--gradient-accumulation", "--optim-args", "second_moment=factored"],
            "by the block rule alone: got second_moment=factored",
        ),
        (["llama-60m", "--plot", "no_such_folder/a.png"], "--plot: no folder no_such_folder"),
        (["llama-60m", "--plot", "a.txt"], "--plot: cannot draw 'a.txt'; expected a name that ends in .png"),
        (["llama-60m", "--architecture", "Nonsense"], "transformers has no model class 'Nonsense'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(estimate, arguments, message):
    code, out, err = estimate(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("foam-hf estimate: ") and err.count("\n") == 1


def test_code_that_must_be_trusted_is_not_run(estimate, tmp_path):
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    code, out, err = estimate(tmp_path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "brings its own code, and none of it was run" in err and "--trust-remote-code" in err


def test_an_unknown_name_without_a_network(tmp_path):
    """As a user sees it, in a process of its own: no traceback, no retries, no warnings of other packages."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "foam_hf.cli", "estimate", "Qwen/Qwen2.5-7B-Base"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert without_progress(done.stderr).count("\n") == 1
    assert "the hub cannot be reached; did you mean 'qwen2.5-7b'?" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(model):
    command = f"{sys.executable} -m foam_hf.cli estimate {model} --seq 16 --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_matplotlib_is_only_needed_for_pictures(estimate, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.backend_bases", raising=False)
    assert estimate(model, *SMALL)[0] == 0
    code, _, err = estimate(model, *SMALL, "--plot", "a.png")
    assert code == 2 and "pip install matplotlib" in err


def test_logging_is_as_before(estimate, model):
    logging.disable(logging.NOTSET)
    estimate(model, *SMALL, "--optim", "foam")
    estimate("no/such/model/at/all")
    assert logging.root.manager.disable == logging.NOTSET


# --- Which rows ---


def test_each_optimizer_gets_the_options_that_it_has():
    chosen = chosen_optimizers(["foam, foam_mini", "apollo_adamw"], "2, 8", "rank=4,scale=0.5,state_dtype=bfloat16")
    assert chosen == [
        ("foam", {"level": "2", "scale": "0.5", "state_dtype": "bfloat16"}),
        ("foam", {"level": "8", "scale": "0.5", "state_dtype": "bfloat16"}),
        ("foam_mini", {"scale": "0.5", "state_dtype": "bfloat16"}),
        ("apollo_adamw", {"rank": "4", "scale": "0.5"}),
    ]
    assert [name for name, _ in chosen_optimizers([COMPARED], None, "level=2")] == COMPARED.split(", ")
    assert dict(chosen_optimizers([COMPARED], None, "level=2"))["foam_mini"] == {}


def test_the_rule_of_embeddings_goes_to_optimizers_with_the_block_rule():
    rows = chosen_optimizers(["foam,foam_mini,foam_muon,adamw_torch"], None, "embedding_rule=factored")
    asked = {"embedding_rule": "factored"}
    assert rows == [("foam", asked), ("foam_mini", asked), ("foam_muon", {}), ("adamw_torch", {})]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_row(estimate, model, name):
    code, out, _ = estimate(model, *SMALL, "--optim", name)
    assert code == 0 and cells(out)[0][0] == name


# --- What the package can do where nothing fits ---


def test_qwen_of_7_b_on_a_card_of_12_gb_by_a_bundled_config(estimate):
    """The first question of a new user: INT8 weights with gradient release fit, and a config has them."""
    code, out, err = estimate("qwen2.5-7b", "--gpu", "12GB", "--optim", "foam")
    assert (code, err) == (0, "")
    total = re.search(r"^foam with (--.*) and a batch of 1 takes (1[01]\.\d\d) GB\.$", out, re.MULTILINE)
    assert total and {"--gradient-release", "--int8-weights"} <= set(total[1].split())
    assert "from_pretrained('Qwen/Qwen2.5-7B', dtype='bfloat16', quantization_config=foam_hf.Int8Config())" in out
    assert "--config quantized/qwen2.5-7b-int8.yaml --per_device_train_batch_size 1 --max_length 512" in out


def test_eight_billion_on_a_card_of_8_gb_by_weights_in_host_memory(estimate):
    code, out, err = estimate("llama-3.1-8b", "--gpu", "8GB", "--optim", "foam", "--gradient-checkpointing")
    assert (code, err) == (0, "")
    words = r"^foam with --gradient-release --gradient-checkpointing --int8-weights --offload and a batch of 1 takes "
    assert re.search(words + r"4\.\d\d GB, and 7\.20 GB of host memory\.$", out, re.MULTILINE)
    assert re.search(r"hidden behind the arithmetic from 2,0\d\d tokens a step: .* 2 x weights x tokens", out)
    assert "quantization_config=foam_hf.Int8Config(offload='cpu'))" in out
    assert "quantized/llama-3.1-8b-int8.yaml" in out and "--int8_offload true" in out
    command = out.rstrip().splitlines()[-1].split()
    assert command[-1] == "--offload"


def test_weights_in_host_memory_are_planned_for_foam_alone(estimate, model):
    code, out, _ = estimate(model, *SMALL, "--offload", "--optim", "foam,adamw_torch", "--json")
    assert code == 0
    rows = {plan["optim"]: plan for plan in plans(out)}
    assert rows["foam"]["int8_weights"] and rows["foam"]["gradient_release"] and rows["foam"]["offload_weights"]
    assert rows["foam"]["host"] > 0 == rows["adamw_torch"]["host"]
    _, out, _ = estimate(model, *SMALL, "--offload", "--optim", "foam")
    assert "INT8 weights in host memory" in out and "INT8 weights cross the bus three times a step" in out
    _, out, _ = estimate(model, *SMALL, "--offload", "--optim", "foam,adamw_torch", "--gradient-accumulation")
    assert "cross the bus three times a micro-batch" in out and "tokens a micro-batch: bytes / bus" in out
    assert "the other optimizers are planned without" in out and "host memory" in out.splitlines()[3]


def test_a_recipes_config_lends_what_it_lacks_as_flags():
    from foam_hf.cli.way_out import WayOut, bundled_configs, recipe_command

    plan = estimate_memory("llama-60m", "foam", sequence=8)
    found = WayOut(plan, ("gradient_release", "gradient_checkpointing"), True)
    for asked in ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"):
        run = recipe_command(found, asked, 8)[1]
        assert "--config instruct/llama-3.1-8b.yaml" in run
        assert "gradient_release=true" in run and "--gradient_accumulation_steps" not in run
    assert recipe_command(found, "llama-60m", 8) == []
    assert {name for name, _, _ in bundled_configs()} == {"quantized", "instruct"}


def llava(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = {"num_hidden_layers": 1, "intermediate_size": 32}
    text = LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, max_position_embeddings=4096, **sizes)
    vision = CLIPVisionConfig(hidden_size=32, num_attention_heads=2, image_size=56, patch_size=14, **sizes)
    config = LlavaConfig(text_config=text, vision_config=vision)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    return tmp_path


def test_patches_are_no_limit_of_the_text_and_what_did_not_run_is_said(estimate, model, tmp_path):
    code, out, err = estimate(llava(tmp_path), "--seq", "64", "--optim", "foam")
    assert (code, err) == (0, "")
    assert "with text alone: model.vision_tower, model.multi_modal_projector did not run and is not counted" in out
    assert "not compared with a GPU" in out and "NVIDIA" not in out
    assert "did not run" not in estimate(model, *SMALL, "--optim", "foam")[1]
