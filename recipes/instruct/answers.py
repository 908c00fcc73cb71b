"""Greedy answers of a chat model, and whether their final number is right, as GSM8K is scored."""

import re
from decimal import Decimal

import torch
from transformers import GenerationConfig

NUMBER = re.compile(
    r"(?<![\w.])[-\u2212]?(?:\$ ?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-\u2212]?\$?\.\d+"
)


def final_number(text: str) -> Decimal | None:
    """The number behind the last ``####``, else the last number of the text; None if there is none.

    Thousands' commas, a dollar sign and a full stop behind the number do not count: ``$1,234.50.`` is 1234.5.
    """
    _, mark, behind = text.rpartition("####")
    found = NUMBER.findall(behind)
    chosen = found[0] if mark and found else (NUMBER.findall(text) or [None])[-1]
    if chosen is None:
        return None
    return Decimal(re.sub(r"[$,\s]", "", chosen).replace("\u2212", "-"))


def exact_match(answers: list[str], references: list[str]) -> dict:
    """How many answers end in their reference's number; references without a number are left out and counted."""
    pairs = [(final_number(a), final_number(r)) for a, r in zip(answers, references, strict=True)]
    scored = [(answer, reference) for answer, reference in pairs if reference is not None]
    correct = sum(answer == reference for answer, reference in scored)
    return {
        "exact_match": correct / len(scored) if scored else None,
        "correct": correct,
        "count": len(scored),
        "references_without_a_number": len(pairs) - len(scored),
    }


def stop_tokens(model, tokenizer) -> list[int]:
    """Ids that end an answer: the tokenizer's end of sequence, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *configured] if token is not None})


def prompt_text(prompt: str | list[dict], tokenizer, template_kwargs: dict) -> str:
    """The text that the model continues: a plain prompt as it is, a conversation through the chat template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template_kwargs)


@torch.no_grad()
def generate(model, tokenizer, prompts: list, *, template_kwargs: dict, max_new_tokens: int, batch_size: int) -> list:
    """The model's greedy answers to `prompts`, in their order; batches are padded on the left."""
    texts = [prompt_text(prompt, tokenizer, template_kwargs) for prompt in prompts]
    # Templates write their own special tokens; plain prompts get what the tokenizer adds, as in training.
    ids = [
        tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # neighbours of equal length: little padding
    stops = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    # What is not said here comes from the model's own config; Qwen's has a penalty on what the prompt says.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops,
        pad_token_id=pad,
        use_cache=True,
    )
    training, answers = model.training, [""] * len(ids)
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(ids[i]) for i in batch)
            rows = [[pad] * (width - len(ids[i])) + ids[i] for i in batch]
            masks = [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch]
            output = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(masks, device=model.device),
                generation_config=settings,
            )
            for i, answer in zip(batch, output[:, width:].tolist(), strict=True):
                answers[i] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    finally:
        model.train(training)
    return answers
