"""One run of a quality study: with the file of a job it trains, and writes results.json into the job's folder.

A job names a runner: `glue` is recipes/glue/train.py with the optimizers that Trainer does not know built here
(candidates.py, Adam-mini, LoRA); `pydoc` is tiny_language.py.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from foam_hf import foam_param_groups
from foam_hf.memory import state_bytes
from foam_hf.optim_args import FOAM_NAMES
from foam_hf.optimizer.groups import layer_names
from foam_hf.recipe_kit import write_json
from recipes.benchmarks.common.folders import RECIPES, load_script
from recipes.benchmarks.quality import tiny_language
from recipes.benchmarks.quality.before import options_before
from recipes.benchmarks.quality.candidates import Candidate

OWN = ("candidate", "adam_mini")  # built here; Trainer is told another name


RECIPE = load_script(RECIPES / "glue" / "train.py", "quality_glue_train")  # at import, so that forks find it done


def main(argv: list[str]) -> dict:
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    result = {"glue": glue, "pydoc": tiny_language.run}[job["runner"]](job)
    write_json(Path(job["folder"]) / "results.json", result)
    return result


def words_of(job: dict) -> list[str]:
    """The command line of train.py for a job."""
    arm = job["arm"]
    own = arm["optim"] in OWN
    options = {} if own else arm["optim_args"]
    if arm["optim"] in FOAM_NAMES:
        options = options_before(arm["optim"], options)
    values = {
        "task_name": job["task"],
        "model_name_or_path": job["model"],
        "dataset_path": job["data"],
        "output_dir": job["folder"],
        "optim": "adamw_torch" if own else arm["optim"],
        "learning_rate": job["rate"],
        "seed": job["seed"],
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        **job["settings"],
    }
    if options:
        values["optim_args"] = ",".join(f"{name}={_plain(value)}" for name, value in options.items())
    return [word for name, value in values.items() for word in (f"--{name}", _plain(value))]


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def glue(job: dict) -> dict:
    """Train and evaluate by the recipe; its score, and what the optimizer kept."""
    arm, recipe, seen = job["arm"], RECIPE, SimpleNamespace()
    load_model, build_trainer = recipe.load_model, recipe.build_trainer

    def with_adapters(*arguments):
        tokenizer, model = load_model(*arguments)
        seen.all_bytes = 8 * sum(p.numel() for p in model.parameters())
        if arm["lora"]:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **arm["lora"]))
            model.accepts_loss_kwargs = False
        return tokenizer, model

    def with_optimizer(*arguments):
        trainer = build_trainer(*arguments)
        trainer.save_model = trainer.save_state = lambda *_: None  # a grid of saved models fills a disk
        if arm["optim"] in OWN:
            trainer.optimizer = build_optimizer(arm, trainer)
        seen.trainer = trainer
        return trainer

    recipe.load_model, recipe.build_trainer = with_adapters, with_optimizer
    try:
        found = recipe.main(words_of(job))
    finally:
        recipe.load_model, recipe.build_trainer = load_model, build_trainer
    return {
        "score": found["main_score"],
        "loss": found["scores"]["loss"],
        "scores": {name: value for name, value in found["scores"].items() if name != "loss"},
        "train_loss": found["train_loss"],
        "steps": found["steps"],
        "state_bytes": found["optimizer_state_bytes"],
        "adamw_state_bytes": seen.all_bytes,
        "folded_state_share": None if arm["lora"] else folded_share(seen.trainer.model, seen.trainer.optimizer),
        "peak_cuda_bytes": found["peak_cuda_bytes"],
        "seconds": round(found["seconds"]["train"], 1),
        "versions": found["versions"],
    }


def build_optimizer(arm: dict, trainer):
    """A candidate or Adam-mini over the Trainer's model, with Trainer's betas, eps and decay."""
    args, model, options = trainer.args, trainer.model, dict(arm["optim_args"])
    common = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if arm["optim"] == "candidate":
        if options.get("residual_start") is not None:
            batches = -(-len(trainer.train_dataset) // args.train_batch_size)
            default = args.max_steps if args.max_steps > 0 else int(batches * args.num_train_epochs)
            options.setdefault("total_steps", default)
        groups = foam_param_groups(model, weight_decay=args.weight_decay, fold_embeddings=False, fold_head=False)
        return Candidate(groups, **common, **options)
    from adam_mini import Adam_mini

    config = model.config
    optimizer = Adam_mini(
        model.named_parameters(),
        **common,
        weight_decay=args.weight_decay,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        verbose=False,
        **options,
    )
    optimizer.adam_block_names |= {"norm"}  # it takes BERT's attention.output.LayerNorm for a matrix
    return optimizer


def folded_share(model, optimizer) -> float | None:
    """Bytes of state on the layers' matrices, over AdamW's eight a parameter; None where no state is theirs."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = dict(model.named_parameters())
    folded = [parameters[name] for name in sorted(layer_names(model))]
    state = {p: optimizer.state[p] for p in folded if p in optimizer.state}
    if not state or len(state) < len(folded):
        return None
    held = state_bytes(SimpleNamespace(state=state, param_groups=[{"params": list(state)}]))
    return held / (8 * sum(p.numel() for p in folded))


if __name__ == "__main__":
    main(sys.argv[1:])
