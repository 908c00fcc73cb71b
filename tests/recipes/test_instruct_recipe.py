"""The instruct recipe: whole runs on tiny models, its loss, its scores, its saved models."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.instruct_runs import (
    CONFIGS,
    RECIPE,
    ROOT,
    byte_tokenizer,
    flags,
    load_script,
    save_model,
    sums,
    write_jsonl,
)
from tests.support.recipe_errors import exit_message

pytestmark = pytest.mark.long

train = load_script()

import answers  # noqa: E402
import chat_models  # noqa: E402
import instruct_arguments  # noqa: E402
import instruct_data  # noqa: E402
import measuring  # noqa: E402

FAMILIES = ("smollm2", "qwen2.5-instruct", "qwen2.5", "qwen3", "llama")
METHODS = instruct_arguments.METHODS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_model(tmp_path_factory.mktemp("model") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", sums())


error_of = functools.partial(exit_message, train.main)


# ---- whole runs ----


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_two_steps(config, models, data, tmp_path):
    named = yaml.safe_load(config.read_text(encoding="utf-8"))["model_name_or_path"].split("/")[-1].lower()
    family = next(f for f in FAMILIES if named.startswith(f.split("-")[0]) and named.endswith(f.partition("-")[2]))
    results = train.main(["--config", str(config), *flags(models[family], data, tmp_path)])
    assert results["steps"] == 2
    assert results["before"]["eval_loss"] != results["after"]["eval_loss"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_down_what_it_did(method, models, data, tmp_path, capsys):
    settings = ["--method", method, "--eval_exact_match", "true", "--seed", "7"]
    results = train.main(flags(models["llama"], data, tmp_path, *settings))
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (results["method"], results["optim"], results["seed"], results["steps"]) == (method, "foam", 7, 2)
    for scores in (results["before"], results["after"]):
        assert scores["count"] == 3 and 0 <= scores["exact_match"] <= 1
        assert scores["perplexity"] == pytest.approx(2.718281828 ** scores["eval_loss"])
        assert [sample["reference"].startswith("Sum.\n####") for sample in scores["samples"]] == [True] * 3
    assert results["before"]["samples"][0]["prompt"] == results["after"]["samples"][0]["prompt"]
    assert results["tokens_per_second"] > 0 and results["optimizer_state_bytes"] > 0
    assert results["peak_bytes"] is None
    assert results["settings"]["max_new_tokens"] == 4 and "optim_args" not in results["settings"]
    assert results["versions"]["trl"] and results["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "exact match" in printed and "from_pretrained" in printed and printed.count("before: ") == 3
    assert ("one value a row" in printed) == (method not in instruct_arguments.WHOLE)


def test_fully_trained_weights_load_in_plain_transformers(models, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train.main(flags(models["qwen2.5"], data, tmp_path, "--eos_token", "<|im_end|>", "--learning_rate", "0.01"))
    before = AutoModelForCausalLM.from_pretrained(models["qwen2.5"])
    after = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert after.dtype == torch.bfloat16
    changed = {n for n, p in after.named_parameters() if not torch.equal(p.float(), before.get_parameter(n).float())}
    assert changed == {name for name, _ in before.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    assert after.generation_config.eos_token_id[0] == tokenizer.eos_token_id


@pytest.mark.parametrize("method", ["lora", "lora8bit", "qlora"])
def test_a_trained_adapter_reloads_with_identical_logits(method, models, data, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainers = []
    build = train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda *args: trainers.append(build(*args)) or trainers[0])
    train.main(flags(models["llama"], data, tmp_path, "--method", method, "--learning_rate", "0.01"))
    quantization = chat_models.quantization_of(method, torch.bfloat16)
    kwargs = {"quantization_config": quantization} if quantization else {}
    base = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.bfloat16, **kwargs)
    reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
    trained = trainers[0].model.eval()
    for name, p in reloaded.named_parameters():
        # On quantized weights TRL trains adapters in bf16, and PEFT loads the same values in fp32.
        assert torch.equal(p, trained.get_parameter(name).to(p.dtype))
        p.data = p.data.to(trained.get_parameter(name).dtype)
    for module in reloaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as in the run: other kernels round otherwise
    ids = AutoTokenizer.from_pretrained(tmp_path)("Add 3 and 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found = trained(ids).logits, reloaded(ids).logits
        with trained.disable_adapter():
            without = trained(ids).logits
    assert torch.equal(found, expected)
    assert not torch.equal(without, expected), "the adapter does nothing"


def test_a_copied_recipe_runs_as_the_readme_says(models, data, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    copy = "-m foam_hf.cli recipes copy instruct my_instruct"
    subprocess.run([sys.executable, *copy.split()], cwd=tmp_path, env=env, check=True, capture_output=True)
    command = [sys.executable, "my_instruct/train.py", *flags(models["llama"], data, tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("of state in all") == 1, "the optimizer's summary, once"
    assert "train: 9 examples" in done.stdout and "after training:" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["steps"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_bytes_by_kind_add_up_to_the_peak(method, models, data, tmp_path):
    command = flags(models["llama"], data, tmp_path, "--method", method, "--use_cpu", "false")
    peak = train.main(command)["peak_bytes"]
    assert peak["total"] == sum(size for kind, size in peak.items() if kind != "total")
    assert all(size > 0 for size in peak.values())


def test_int8_weights_are_trained_saved_and_resumed_on(models, data, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from foam_hf.int8.weight import Int8Weight

    more = ["--method", "int8", "--int8_head", "true", "--optim_args", "level=3,gradient_release=true"]
    first = train.main(flags(models["llama"], data, tmp_path / "a", *more))
    assert "import foam_hf; transformers.AutoModelForCausalLM" in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    names = {name for name, p in trained.named_parameters() if isinstance(p, Int8Weight)}
    assert len(names) == 15 and "lm_head.weight" in names
    again = train.main(flags(tmp_path / "a", data, tmp_path / "b", *more))
    assert again["before"]["eval_loss"] == pytest.approx(first["after"]["eval_loss"], abs=1e-3)
    assert "cannot train INT8" in error_of(flags(models["llama"], data, tmp_path / "c", *more[:4], "--optim", "sgd"))
    assert "--int8_head is of --method int8" in error_of(flags(models["llama"], data, tmp_path / "c", *more[2:4]))
    offload = ["--int8_offload", "true"]
    visiting = train.main(flags(models["llama"], data, tmp_path / "d", *more, *offload))
    assert visiting["after"]["eval_loss"] == first["after"]["eval_loss"]
    for some, words in (
        (offload, "--int8_offload is of --method int8"),
        ([*more[:4], *offload], "expected gradient_"),
    ):
        assert words in error_of(flags(models["llama"], data, tmp_path / "c", *some))


# ---- the loss ----


def prepared(model: Path, data: Path, out: Path, *more: str):
    """The trainer of a run, and its training rows as TRL prepared them."""
    recipe, args, _ = instruct_arguments.parse(flags(model, data, out, *more))
    rows = instruct_data.load_instructions(recipe, whole_conversations=args.assistant_only_loss)
    trainer = train.build_trainer(recipe, args, rows, measuring.Meter())
    return trainer, list(trainer.train_dataset)


def halves(row: dict, tokenizer) -> tuple[str, str]:
    """The text without a loss, and the text with one."""
    carries = [label != -100 for label in row["labels"]]
    start = carries.index(True)
    assert all(carries[start:])
    assert [label for label in row["labels"] if label != -100] == row["input_ids"][start:]
    return tokenizer.decode(row["input_ids"][:start]), tokenizer.decode(row["input_ids"][start:])


@pytest.mark.parametrize(
    ("family", "more", "prompt_end", "answer_end"),
    [
        ("smollm2", [], "<|im_start|>assistant\n", "<|im_end|>\n"),
        ("qwen2.5", ["--eos_token", "<|im_end|>"], "<|im_start|>assistant\n", "<|im_end|>\n"),
        (
            "qwen3",
            ["--chat_template_kwargs", '{"enable_thinking": false}'],
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "<|im_end|>\n",
        ),
        ("llama", [], "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ],
)
def test_the_loss_is_on_the_answer_alone_and_on_its_end(family, more, prompt_end, answer_end, models, data, tmp_path):
    trainer, rows = prepared(models[family], data, tmp_path, *more)
    tokenizer = trainer.processing_class
    texts = [halves(row, tokenizer) for row in rows]
    answer = "Sum.\n#### "
    assert all(prompt.endswith(prompt_end) and "Add " in prompt and answer not in prompt for prompt, _ in texts)
    assert all(found.startswith(answer) and found.endswith(answer_end) for _, found in texts)
    assert tokenizer.decode(tokenizer.eos_token_id) in answer_end
    # Padding has no loss, and what ends an answer has one, also where both are the same token.
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert ((batch["labels"] == tokenizer.eos_token_id).sum(dim=1) == 1).all()


def test_thinking_left_to_the_model_is_part_of_the_answer(models, data, tmp_path):
    trainer, rows = prepared(models["qwen3"], data, tmp_path)
    prompt, answer = halves(rows[0], trainer.processing_class)
    assert prompt.endswith("<|im_start|>assistant\n") and answer.startswith("<think>\n\n</think>\n\nSum.")


def test_every_answer_of_a_conversation_is_trained_behind_what_precedes_it(models, tmp_path):
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "2.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write_jsonl(tmp_path / "talks.jsonl", [row] * 6)
    trainer, rows = prepared(models["smollm2"], path, tmp_path / "out")
    texts = {halves(row, trainer.processing_class) for row in rows}
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    later = start + "1.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == {(start, "1.<|im_end|>\n"), (later, "2.<|im_end|>\n")}


def test_assistant_only_loss_keeps_conversations_whole(models, tmp_path):
    turns = [("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "2.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write_jsonl(tmp_path / "talks.jsonl", [row] * 6)
    more = ["--assistant_only_loss", "true", "--eos_token", "<|im_end|>"]
    trainer, rows = prepared(models["qwen2.5"], path, tmp_path / "out", *more)
    assert len(rows) == 3
    trained = trainer.processing_class.decode([token for token in rows[0]["labels"] if token != -100])
    assert trained.split() == ["1.<|im_end|>", "2.<|im_end|>"]
    results = train.main(flags(models["qwen2.5"], path, tmp_path / "out", *more))
    assert results["after"]["samples"][0]["reference"] == "2."


def test_plain_prompts_are_trained_without_a_template(models, tmp_path):
    path = write_jsonl(
        tmp_path / "plain.jsonl", [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(6)]
    )
    trainer, rows = prepared(models["llama"], path, tmp_path / "out")
    assert {halves(row, trainer.processing_class)[1] for row in rows} <= {f"{i + 1}<|eot_id|>" for i in range(6)}
    assert train.main(flags(models["llama"], path, tmp_path / "out"))["steps"] == 2


@pytest.mark.parametrize("method", ["lora8bit", "qlora"])
def test_an_evaluation_does_not_change_the_gradients_of_quantized_models(method, models, data, tmp_path):
    def gradients(evaluate_first: bool) -> list[torch.Tensor]:
        trainer, _ = prepared(models["llama"], data, tmp_path, "--method", method)
        model = trainer.model
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(p, 0.01)  # zero at first, which hides the gradients of lora_A
        ids = torch.arange(3, 43).reshape(2, 20)
        if evaluate_first:
            trainer.evaluate()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for first, second in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(first, second)


def test_long_examples_are_cut_and_counted(models, tmp_path, capsys):
    rows = sums(8) + [{"instruction": "Add", "output": "4 " * 60}, {"instruction": "Add " * 60, "output": "4"}]
    folder = tmp_path / "data"
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "validation.jsonl", sums(3))
    results = train.main(flags(models["smollm2"], folder, tmp_path / "out", "--max_length", "120"))
    counts = results["data"]["train"]
    assert (counts["used"], counts["too_long"], counts["dropped_without_answer"]) == (10, 2, 1)
    assert results["data"]["held_out"]["too_long"] == 0
    printed = capsys.readouterr().out
    assert "2 are longer than 120 and are cut; 1 have no answer left and are dropped" in printed


# ---- answers ----


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### $ 5", "5"),
        ("#### -3", "-3"),
        ("#### \u22123", "-3"),
        ("#### 10 apples of 12", "10"),
        ("#### 1 no, #### 2", "2"),
        ("The answer is $1,234.50.", "1234.5"),
        ("It took 12 days, then 3.", "3"),
        ("10 - 4 = 6, as 10-4", "4"),
        ("it is -$5", "-5"),
        ("list:\n- 5", "5"),
        ("a list 1,2,3", "3"),
        ("half of it is .5", "0.5"),
        ("20%", "20"),
        ("7.0", "7"),
        ("we have 8 left #### none", "8"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number_of_an_answer(text, number):
    found = answers.final_number(text)
    assert (found is None) == (number is None)
    assert number is None or found == answers.Decimal(number)


def test_exact_match_leaves_out_references_without_a_number():
    scores = answers.exact_match(["is 4.0", "#### 1,000", "none", "3"], ["#### 4", "1000", "#### 2", "nothing"])
    expected = {"exact_match": pytest.approx(2 / 3), "correct": 2, "count": 3, "references_without_a_number": 1}
    assert scores == expected
    assert answers.exact_match(["1"], ["one"])["exact_match"] is None


def test_batched_answers_are_those_of_one_prompt_at_a_time_and_end_where_they_should(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "smollm2", initializer_range=0.5))
    prompts = [[{"role": "user", "content": "x" * length}] for length in (30, 2, 11)] + ["plain"]
    settings = {"template_kwargs": {}, "max_new_tokens": 12}
    one_by_one = [answers.generate(model, tokenizer, [p], batch_size=1, **settings)[0] for p in prompts]
    assert answers.generate(model, tokenizer, prompts, batch_size=3, **settings) == one_by_one
    assert len(set(one_by_one)) > 1
    model.generation_config.repetition_penalty = 9.0  # Qwen's models have one, and greedy answers do not
    assert answers.generate(model, tokenizer, prompts, batch_size=2, **settings) == one_by_one
    # Whatever comes third in the first answer ends it from now on.
    text = answers.prompt_text(prompts[0], tokenizer, {})
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=3, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    model.generation_config.eos_token_id = [output[2]]
    shorter = answers.generate(model, tokenizer, prompts[:1], batch_size=1, **settings)[0]
    end = output.index(output[2])
    assert shorter == tokenizer.decode(output[: end + 1], skip_special_tokens=True).strip()
    assert model.training is False


def test_generation_leaves_a_training_model_training(models):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["smollm2"]).train()
    answers.generate(model, byte_tokenizer(), ["a"], template_kwargs={}, max_new_tokens=1, batch_size=1)
    assert model.training


# ---- errors ----


def test_a_quantized_checkpoint_without_adapters_names_both_ways(models, data, tmp_path):
    from transformers import AutoModelForCausalLM

    quantization = chat_models.quantization_of("qlora", torch.bfloat16)
    quantized = AutoModelForCausalLM.from_pretrained(models["llama"], quantization_config=quantization)
    quantized.save_pretrained(tmp_path / "quantized")
    byte_tokenizer("llama").save_pretrained(tmp_path / "quantized")
    message = error_of(flags(tmp_path / "quantized", data, tmp_path / "out"))
    for words in ("quantized (bitsandbytes)", "--method lora", "foam_hf.Int8Config"):
        assert words in message
    assert train.main(flags(tmp_path / "quantized", data, tmp_path / "out", "--method", "lora"))["steps"] == 2


def test_answers_that_would_never_end_are_refused(models, data, tmp_path):
    message = error_of(flags(models["qwen2.5"], data, tmp_path))
    assert "<|im_end|>" in message and "<|endoftext|>" in message and "--eos_token" in message


def test_a_model_without_a_chat_template_needs_one(models, data, tmp_path):
    model = save_model(tmp_path / "model", "smollm2")
    (model / "chat_template.jinja").unlink()
    message = error_of(flags(model, data, tmp_path / "out"))
    assert "no chat template" in message and "Instruct" in message and "--chat_template_path" in message
    template = tmp_path / "chatml.jinja"
    template.write_text(byte_tokenizer().chat_template)
    results = train.main(flags(model, data, tmp_path / "out", "--chat_template_path", str(template)))
    assert results["steps"] == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method", "dora"], ["--method: got dora", ", ".join(METHODS)]),
        (["--dtype", "float16"], ["--dtype: got float16", "bfloat16, float32"]),
        (["--eval_samples", "1.5"], ["--eval_samples: got 1.5"]),
        (["--eval_samples", "-1"], ["--eval_samples: got -1"]),
        (["--eval_samples", "12"], ["12 of 12 rows"]),
        (["--train_samples", "0"], ["--train_samples: got 0", "at least 1"]),
        (["--optm", "foam"], ["unknown key 'optm'", "'optim'"]),
        (["--optim_args", "levl=8"], ["levl", "level"]),
        (["--optim", "foma"], ["foma"]),
        (["--optim", "lomo"], ["lomo"]),
        (["--learning_rate", "much"], ["learning_rate", "much"]),
        (["--chat_template_kwargs", "thinking"], ["--chat_template_kwargs: got thinking", "JSON"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--model_name_or_path", "./nowhere"], ["no folder", "nowhere"]),
        (["--model_name_or_path", "nowhere.gguf"], ["no file nowhere.gguf"]),
        (["--dataset_path", "nowhere.jsonl"], ["no file or folder nowhere.jsonl"]),
        (["--dataset_name", "a/b"], ["--dataset_path", "--dataset_name", "got both"]),
        (["--lora_target_modules", "nothing", "--method", "lora"], ["nothing"]),
        (["--resume_from_checkpoint", "nowhere"], ["--resume_from_checkpoint: no folder nowhere"]),
        (["--max_length", "4"], ["--max_length: got 4, which cuts off every answer of the 9 train examples"]),
    ],
)
def test_what_cannot_work_is_one_sentence(more, words, models, data, tmp_path):
    message = error_of(flags(models["llama"], data, tmp_path / "out", *more))
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_unknown_key_of_a_config_is_an_error(models, data, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("method: lora\nlearnin_rate: 1.0e-4\n")
    message = error_of(["--config", str(config), *flags(models["llama"], data, tmp_path / "out")])
    assert "learnin_rate" in message and "'learning_rate'" in message


def test_flags_win_over_the_config_and_foams_arguments_stay_with_foam(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("optim: foam\noptim_args: {level: 4, scale: 0.5}\nlearning_rate: 2e-4\nwarmup_steps: 0.1\n")
    base = ["--config", str(config), "--dataset_path", "x", "--output_dir", "y"]
    _, args, settings = instruct_arguments.parse([*base, "--seed", "3", "--hub_token", "secret"])
    assert (args.optim_args, args.learning_rate, args.warmup_steps, args.seed) == ("level=4,scale=0.5", 2e-4, 0.1, 3)
    assert settings["seed"] == 3 and "secret" not in json.dumps(settings)
    assert not capsys.readouterr().out
    _, args, _ = instruct_arguments.parse([*base, "--optim=adamw_torch"])
    assert args.optim_args is None and args.learning_rate == 2e-4
    printed = capsys.readouterr().out
    assert "level=4,scale=0.5" in printed and "dropped for adamw_torch" in printed and "kept" in printed


def test_a_configs_checkpointing_gives_way_to_a_flag_of_either_name(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("gradient_checkpointing: true\n")
    base = ["--config", str(config), "--dataset_path", "x", "--output_dir", "y"]
    names = {field.name for field in dataclasses.fields(instruct_arguments.SFTConfig)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # the config's old name warns nobody
        assert instruct_arguments.parse(base)[1].gradient_checkpointing is True
        if "activation_checkpointing" in names:
            args = instruct_arguments.parse([*base, "--activation_checkpointing", "false"])[1]
            assert args.gradient_checkpointing is False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert (
            instruct_arguments.parse([*base, "--gradient_checkpointing", "false"])[1].gradient_checkpointing is False
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_bfloat16_on_a_cpu_is_said_to_be_slow(tmp_path, capsys):
    for dtype, said in (("bfloat16", True), ("float32", False)):
        error_of(["--dtype", dtype, "--dataset_path", "nowhere.jsonl", "--output_dir", str(tmp_path)])
        assert ("--dtype float32" in capsys.readouterr().out) is said


# ---- the READMEs ----

sys.path.insert(0, str(ROOT / "recipes" / "quantized"))

import method_bytes  # noqa: E402

QUANTIZED_README = ROOT / "recipes" / "quantized" / "README.md"


@pytest.mark.parametrize(
    ("method", "optim"),
    [
        ("full", "AdamW"),
        ("full", method_bytes.LEAN),
        ("int8", "FOAM"),
        ("int8", method_bytes.LEAN),
        (method_bytes.OFFLOAD, method_bytes.LEAN),
        ("lora", "FOAM"),
        ("lora8bit", "AdamW"),
        ("qlora", "FOAM"),
    ],
)
def test_counted_bytes_are_those_of_a_run(method, optim, models, data, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    options = {
        "AdamW": ["--optim", "adamw_torch_fused"],
        "FOAM": ["--optim", "foam"],
        method_bytes.LEAN: ["--optim_args", "gradient_release=true"],
    }[optim]
    meters = []
    monkeypatch.setattr(train, "Meter", lambda: meters.append(measuring.Meter()) or meters[0])
    run = ["int8", "--int8_offload", "true"] if method == method_bytes.OFFLOAD else [method]
    train.main(flags(models["llama"], data, tmp_path, "--method", *run, *options))
    found = meters[0].memory
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(chat_models.AutoConfig.from_pretrained(models["llama"])).bfloat16()
    rows = sum(module.out_features for module in model.model.modules() if isinstance(module, torch.nn.Linear))
    model.model.rotary_emb.float()  # as when a model is loaded
    counted = method_bytes.count(model, method)
    # bitsandbytes keeps the scales of 8-bit weights where no count of parameters and buffers sees them.
    unseen = 4 * rows if method == "lora8bit" else 0
    assert (found.weights, found.state) == (counted["weights"] - unseen, counted[optim])
    assert found.gradients == (0 if optim == method_bytes.LEAN else counted["gradients"])


def test_the_table_of_bytes_is_what_the_code_counts():
    text = QUANTIZED_README.read_text(encoding="utf-8")
    table = text.split(method_bytes.START)[1].split(method_bytes.END)[0].strip()
    assert table == method_bytes.table()


@pytest.mark.parametrize("readme", [RECIPE / "README.md", QUANTIZED_README], ids=str)
def test_commands_of_the_readmes_name_scripts_configs_and_flags_that_exist(readme, tmp_path):
    text = readme.read_text(encoding="utf-8")
    commands = [
        shlex.split(line) for line in re.findall(r"^python (recipes/instruct/train\.py .*)$", text, re.MULTILINE)
    ]
    assert commands
    for script, *words in commands:
        assert (ROOT / script).is_file()
        named = [str(ROOT / word) if word.endswith(".yaml") else word for word in words]
        assert all(Path(word).is_file() for word in named if word.endswith(".yaml"))
        instruct_arguments.parse(named)
    for name in re.findall(r"`([\w.-]+\.yaml)`", text):
        assert (readme.parent / name).is_file(), name
    for flag in re.findall(r"`--(\w+)", text):
        assert flag in {action.dest for action in instruct_arguments.build_parser()._actions}, flag


def test_a_finished_run_is_kept_and_another_of_its_folder_goes_on(models, data, tmp_path, capsys):
    words = flags(models["llama"], data, tmp_path / "out", "--save_strategy", "epoch")
    results = train.main(words)
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert train.main([*words, "--resume_from_checkpoint", "true"]) == results
    assert "is finished: its results are kept" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    longer = train.main([*words, "--resume_from_checkpoint", "true", "--max_steps", "4"])
    assert longer["steps"] == 4 and "Resuming from" in capsys.readouterr().out


def test_scores_before_training_leave_the_order_of_the_data_as_it_is(models, data, tmp_path):
    words = flags(
        models["llama"], data, tmp_path, "--train_sampling_strategy", "group_by_length", "--optim", "adamw_torch"
    )
    with_scores, without = (train.main([*words, "--eval_before", value]) for value in ("true", "false"))
    assert with_scores["before"] and not without["before"]
    assert (with_scores["train_loss"], with_scores["trained_tokens"]) == (
        without["train_loss"],
        without["trained_tokens"],
    )


def test_a_step_is_timed_to_the_end_of_what_the_gpu_does(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.__setitem__(0, clock[0] + 3))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    meter, state = measuring.Meter(), types.SimpleNamespace(num_input_tokens_seen=0)
    for tokens in (50, 40, 40):
        meter.on_step_begin(None, state, None)
        clock[0] += 1
        state.num_input_tokens_seen += tokens
        meter.on_step_end(None, state, None)
    assert (meter.seconds, meter.tokens_per_second) == (8, 10)  # of the last two steps


def test_a_second_run_keeps_the_results_and_a_resumed_one_says_whose_settings_hold(models, data, tmp_path, capsys):
    folder = tmp_path / "out"
    words = [*flags(models["llama"], data, folder), "--save_strategy", "steps", "--save_steps", "2"]
    first = train.main([*words, "--eval_before", "false"])
    with pytest.raises(SystemExit, match="cuts off every answer"):
        train.main([*words, "--max_length", "4"])
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(first)), "refused before it"
    capsys.readouterr()
    settings = ["--learning_rate", "3e-4", "--optim_args", "scale=2", "--max_steps", "3", "--eval_before", "false"]
    train.main([*words, *settings, "--resume_from_checkpoint", str(folder / "checkpoint-2")])
    said = capsys.readouterr().out
    assert "its results.json is now results-1.json" in said and "starts at step 0" not in said
    assert json.loads((folder / "results-1.json").read_text()) == json.loads(json.dumps(first))
    line = next(line for line in said.splitlines() if line.startswith("Resumed at step 2"))
    assert "scale=6.0 (not 2.0)" in line and "(not 0.0003)" in line


def test_modules_for_adapters_may_be_a_list_of_the_config():
    recipe = types.SimpleNamespace(
        method="lora", lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules=["q_proj", "v_proj"]
    )
    assert chat_models.lora_config(recipe).target_modules == {"q_proj", "v_proj"}
