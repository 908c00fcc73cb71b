"""What becomes of training under optim="foam" when it is killed, its disk is full, or its files are damaged; on a CPU.

Every outcome is one of three: an exact continuation (the final weights have the bits of an uninterrupted run), a
refusal (an error that says what is wrong), or a silent difference, of which there must be none.

    python -m recipes.benchmarks.robustness.faults  # minutes; as root, for the small tmpfs of the full disk
    python -m recipes.benchmarks.robustness.faults --kills 5 --damages 1
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from recipes.benchmarks.common.folders import RESULTS

STEPS, EVERY = 12, 2
MANIFEST = "foam_checkpoint.json"
EXACT, REFUSED, SILENT, OTHER = "exact", "refused", "silent", "foreign error"
FILES = (
    ("optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    + ("training_args.bin", "config.json", MANIFEST)
)  # fmt: skip


def load_libraries() -> None:
    """In the parent, once: every trial is a fork of it, so it must not compute anything."""
    import torch
    import transformers
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments  # noqa: F401

    import foam_hf  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def train(output: Path) -> str:
    """Train to the end, going on from what is in `output`; the hash of the final weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    rows = torch.randint(0, 512, (64, 16), generator=torch.Generator().manual_seed(1))
    arguments = {
        "output_dir": str(output), "optim": "foam", "optim_args": "level=3,embedding_rule=block",
        "learning_rate": 1e-3, "max_steps": STEPS,
        "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": EVERY, "save_total_limit": 3,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": STEPS,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    started = any(output.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if started else None)
    digest = hashlib.sha256()
    for name, weight in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fork(output: Path, limit: int | None = None) -> tuple[int, int]:
    """A process that trains: its number, and a pipe to read its result from."""
    reader, writer = os.pipe()
    number = os.fork()
    if number:
        os.close(writer)
        return number, reader
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no trial outlives the campaign
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        found = {"weights": train(output)}
    except BaseException as error:
        found = {"error": type(error).__name__, "message": str(error)}
    os.write(writer, json.dumps(found).encode())
    os._exit(0)


def finish(output: Path, limit: int | None = None) -> dict:
    """Train to the end in a process of its own; its result."""
    number, reader = fork(output, limit)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    os.waitpid(number, 0)
    return json.loads(content) if content else {"error": "death", "message": ""}


def judge(found: dict, expected: str) -> str:
    if "weights" in found:
        return EXACT if found["weights"] == expected else SILENT
    ours = ("cannot be resumed from", "is complete", "could not be saved", "the checkpoint", "parameter ")
    refused = found["error"] in ("ValueError", "OSError") and any(words in found["message"] for words in ours)
    return REFUSED if refused else OTHER


def unfinished(output: Path) -> bool:
    """Whether a save was under way when the process died."""
    for folder in output.glob("checkpoint-*"):
        manifest = folder / MANIFEST
        if not manifest.exists() or not json.loads(manifest.read_bytes())["complete"]:
            return True
    return False


def kills(work: Path, count: int, expected: str, seconds: float, chance: random.Random) -> dict:
    """SIGKILL at a random moment of a run, then a run that goes on."""
    rows: Counter = Counter()
    for i in range(count):
        output = work / f"kill-{i}"
        number, reader = fork(output)
        os.close(reader)
        time.sleep(chance.uniform(0.1, 1.0) * seconds)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        rows["during a save"] += unfinished(output)
        rows["before the first checkpoint"] += not any(output.glob("checkpoint-*"))
        rows[judge(finish(output), expected)] += 1
        shutil.rmtree(output, ignore_errors=True)
    return {"trials": count, **rows}


def damages(work: Path, whole: Path, count: int, expected: str, chance: random.Random, manifest: bool) -> dict:
    """Each kind of file of the newest checkpoint cut off, with one bit flipped, or missing."""
    found: dict = {}
    for name in FILES if manifest else FILES[:5]:
        for how in ("cut off", "bit flipped", "missing"):
            rows: Counter = Counter()
            for i in range(1 if how == "missing" else count):
                output = work / f"damage-{i}"
                shutil.copytree(whole, output)
                newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
                if not manifest:
                    for path in output.glob(f"checkpoint-*/{MANIFEST}"):
                        path.unlink()
                damage(newest / name, how, chance)
                result = finish(output)
                outcome = judge(result, expected)
                rows[outcome] += 1
                if outcome == REFUSED and manifest and how != "missing" and name not in result["message"]:
                    rows["refused without the file's name"] += 1
                if outcome in (SILENT, OTHER):
                    print(f"{name} {how}: {result}", flush=True)
                shutil.rmtree(output)
            found[f"{name}, {how}"] = {"trials": sum(rows[kind] for kind in (EXACT, REFUSED, SILENT, OTHER)), **rows}
    return found


def damage(path: Path, how: str, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)


def full_disk(work: Path, whole: Path, expected: str) -> dict:
    """A disk that fills up at some file of some checkpoint, then has room again."""
    size = sum(path.stat().st_size for path in max(whole.glob("checkpoint-*")).rglob("*"))
    mounted = work / "tmpfs"
    mounted.mkdir()
    rows: Counter = Counter()
    sizes = [int(size * part) for part in (0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1, 2.4, 2.7, 2.95)]
    way = "tmpfs"
    for limit in sizes:
        command = ["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(mounted)]
        if os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
            output = mounted / "run"
            first = finish(output)
            subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(mounted)], check=True)
            second = finish(output)
            subprocess.run(["umount", str(mounted)], check=True)
        else:
            way = "RLIMIT_FSIZE"
            output = work / "limited"
            first = finish(output, limit=max(4096, limit // 4))
            second = finish(output)
            shutil.rmtree(output, ignore_errors=True)
        rows["run on the full disk " + judge(first, expected)] += 1
        if judge(first, expected) == OTHER:
            print(f"full disk: {first}", flush=True)
        outcome = judge(second, expected)
        if outcome == REFUSED and "no checkpoint in" in second["message"]:
            rows["refused, as no save had finished"] += 1
        rows[outcome] += 1
    return {"trials": len(sizes), "disk": way, **rows}


def foreign(work: Path, whole: Path, expected: str) -> dict:
    """The optimizer's file of another checkpoint in place of its own, with the manifest and without."""
    rows: dict = {}
    for label, manifest in (("with the manifest", True), ("without it", False)):
        output = work / "foreign"
        shutil.copytree(whole, output)
        older, newest = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-2:]
        shutil.copy(older / "optimizer.pt", newest / "optimizer.pt")
        if not manifest:
            (newest / MANIFEST).unlink()
        rows[f"of an older step, {label}"] = judge(finish(output), expected)
        shutil.rmtree(output)
    return rows


def total(found: dict, kind: str) -> int:
    return sum(row.get(kind, 0) for row in found.values())


def table(found: dict) -> str:
    """The campaign in Markdown."""
    rows = [
        ("SIGKILL at a random moment", found["kills"]),
        ("a full disk, then room again", found["full disk"]),
    ]
    for how in ("cut off", "bit flipped", "missing"):
        some = [row for name, row in found["damages"].items() if name.endswith(how)]
        kinds = ("trials", EXACT, REFUSED, SILENT, OTHER)
        rows.append((f"a file {how}", {kind: sum(row.get(kind, 0) for row in some) for kind in kinds}))
    lines = [
        "| fault | trials | exact continuation | refused, with the reason | silent difference | another error |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, row in rows:
        counts = (row.get(kind, 0) for kind in ("trials", EXACT, REFUSED, SILENT, OTHER))
        lines.append(f"| {label} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=3, help="of each file, cut off and bit flipped each")
    parser.add_argument("--parts", help="of the campaign, separated by commas; of the default, all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "faults.json")
    options = parser.parse_args(argv)
    chance = random.Random(options.seed)
    load_libraries()
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        whole = work / "whole"
        begun = time.monotonic()
        first = finish(whole)
        seconds = time.monotonic() - begun
        if "weights" not in first:
            raise SystemExit(f"the run without faults failed: {first}")
        expected = first["weights"]
        print(f"a run takes {seconds:.1f} s", flush=True)
        # What later trials resume from: its newest checkpoint is not the end of training.
        shutil.rmtree(max(whole.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))
        earlier = work / "earlier"
        shutil.copytree(whole, earlier)
        found: dict = {
            "steps": STEPS,
            "save_steps": EVERY,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        parts = {
            "kills": lambda: kills(work, options.kills, expected, seconds, chance),
            "damages": lambda: damages(work, earlier, options.damages, expected, chance, manifest=True),
            "full disk": lambda: full_disk(work, earlier, expected),
            "foreign optimizer.pt": lambda: foreign(work, earlier, expected),
            "damages without a manifest": lambda: damages(work, earlier, 1, expected, chance, manifest=False),
        }
        chosen = list(parts) if options.parts is None else options.parts.split(",")
        if unknown := [name for name in chosen if name not in parts]:
            parser.error(f"--parts: unknown {', '.join(unknown)}; expected some of {', '.join(parts)}")
        for label, part in ((label, parts[label]) for label in chosen):
            found[label] = part()
            print(label, json.dumps(found[label]), flush=True)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(found, indent=1) + "\n")
    if options.parts is None:
        print(table(found))
    return found


if __name__ == "__main__":
    main()
