"""Supervised fine-tuning: teach a model to write like a text data set or to complete prompts, or make a new model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rlhf_ppo.config.sft import SFTArgs
from rlhf_ppo.core import token_logprobs
from rlhf_ppo.data.chat import Prompt, render_answer, render_prompt, with_chat_template
from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.data.mixtures import load_mixture
from rlhf_ppo.data.preferences import prompt_and_answer
from rlhf_ppo.data.rows import Rows, RowSource, as_rows, require_column
from rlhf_ppo.data.tokenization import encode_after, encode_text, require_vocabulary, tokenize_prompt
from rlhf_ppo.models.compare import probe_logits, require_saved
from rlhf_ppo.models.forward_checks import require_decoder
from rlhf_ppo.models.loading import (
    context_length,
    load_config,
    load_policy,
    load_tokenizer,
    refuse_encoder_decoder,
    resolve_model,
    saved_bytes,
    vocabulary_size,
)
from rlhf_ppo.models.quantization import round_weights
from rlhf_ppo.models.quiet_libraries import without_library_bars
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.files import require_space, save_or_rescue
from rlhf_ppo.runtime.processes import require_one_process, torch_threads
from rlhf_ppo.runtime.progress import ProgressDisplay, model_rows, print_summary
from rlhf_ppo.runtime.run_directory import RunDirectory, run_lock
from rlhf_ppo.training.optimizer import fit_warmup
from rlhf_ppo.training.stability import nonfinite_parameters

END_OF_TEXT = "<|endoftext|>"


class Example(NamedTuple):
    """What one row teaches."""

    prompt: Prompt
    completion: str
    where: str
    """The row's name in messages."""


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, learned from ``texts``; end of text is its only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _settle_tokenizer(args: SFTArgs, texts: list[str]) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The model's configuration and tokenizer, which every row is checked with before the model itself is loaded."""
    if args.model is not None:
        name = resolve_model(args.model)
        return load_config(name), with_chat_template(load_tokenizer(name), args.chat_template)
    if str(args.architecture).endswith(".json") and not Path(str(args.architecture)).is_file():
        raise FileNotFoundError(f"architecture {args.architecture}: there is no such file")
    config = AutoConfig.from_pretrained(str(args.architecture), trust_remote_code=False)
    refuse_encoder_decoder(config, f"architecture {args.architecture}", "name a decoder's (GPT-2, Llama, Qwen, ...)")
    tokenizer = train_tokenizer(texts, config.vocab_size, context_length(config) or args.max_length)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"architecture {args.architecture} has vocab_size={config.vocab_size}, but every byte and end of text make "
            f"{len(tokenizer)} tokens: raise it"
        )
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return config, with_chat_template(tokenizer, args.chat_template)


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right by length, never by id: an end-of-text token that ends a row stays a target."""

    def pad(name: str, value: int) -> torch.Tensor:
        columns = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    mask = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", -100),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
    }


def hold_out(rows: Rows, args: SFTArgs) -> dict[str, Rows]:
    """The rows in two parts, ``train`` and ``test``, by ``eval_fraction`` and ``seed``."""
    return rows.train_test_split(max(1, round(args.eval_fraction * len(rows))), seed=args.seed)


def read_examples(rows: RowSource, args: SFTArgs) -> list[Example]:
    """The example of each row; a plain text is a completion of nothing, so all of it is learned.

    Raises:
        ValueError: a missing column, or a row that is neither text nor a conversation; names the row.
    """
    rows = as_rows(rows)
    column = args.completion_column or args.text_column
    require_column(rows, column)
    if args.prompt_column is None:
        prompts: Iterable[Any] = [None] * len(rows)
    else:
        require_column(rows, args.prompt_column)
        prompts = rows[args.prompt_column]
    examples: list[Example] = []
    for where, prompt, answer in zip(rows.names, prompts, rows[column], strict=True):
        plain = prompt is None and isinstance(answer, str)  # may be empty: text collections have such rows
        pair = ("", answer) if plain else prompt_and_answer(prompt, answer, f"{where}, {column}")
        if pair[0] == []:
            raise ValueError(f"{where}, {column}: a conversation needs a message before the assistant's answer")
        examples.append(Example(*pair, where))
    return examples


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, longest: int, name: str, *, vocab_size: int
) -> Dataset:
    """Token ids and labels (-100 on the prompt and on the first token of all) of each example, cut to ``longest``.

    A prompt becomes ids by itself, as it does under PPO, and its completion ids that decode to it behind the prompt (a
    chat's answer the ids that it has in the chat); end of text comes last, once. The first token of a sequence is
    predicted from nothing, so it must not count as learned; an empty text is left out.

    Raises:
        ValueError: a prompt that cannot be read or a token id that is not below ``vocab_size`` (names the row), or no
            prompt leaves room for its completion.
    """
    encoded: list[dict[str, Any]] = []
    filled = 0
    pieces = TextPieces(tokenizer, special=True)
    for prompt, completion, where in examples:
        start = tokenize_prompt(prompt, tokenizer, where) if prompt else []
        if not prompt:
            answer = encode_text(tokenizer, completion, ended=False)
        elif isinstance(prompt, str):
            answer = pieces.encode(pieces.before(start, prompt), completion)
        else:
            text = render_answer(tokenizer, prompt, completion, where)
            whole = encode_after(tokenizer, render_prompt(tokenizer, prompt, where), text)
            answer = pieces.encode(Before(start), text) if whole is None else whole
        end = [] if answer[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        ids = [*start, *answer, *end][:longest]
        require_vocabulary(ids, vocab_size, where)
        given = max(1, len(start))
        filled += len(start) >= longest
        if len(ids) > given:
            labels = [-100] * given + ids[given:]
            encoded.append({"input_ids": ids, "labels": labels, "length": len(ids)})
    if not encoded:
        raise ValueError(
            f"{name}: there is nothing to learn: every prompt fills max_length={longest} and leaves no room for its "
            "completion, or every text is empty"
        )
    if filled:
        warnings.warn(
            f"{name}: left out {filled} of {len(examples)} rows whose prompt fills the {longest} tokens",
            stacklevel=3,
        )
    return Dataset.from_list(encoded)


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, rows: Dataset, batch_size: int) -> float:
    """-log-likelihood of all learned tokens of :func:`encode_examples` over their number, whatever the batches.

    Taken from the logits: the model's own loss may hold more, such as that of a mixture of experts' router.
    """
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = _collate([dict(rows[i]) for i in range(start, min(start + batch_size, len(rows)))])
        labels = batch.pop("labels").to(model.device)[:, 1:]
        learned = labels != -100
        logits = model(**{name: x.to(model.device) for name, x in batch.items()}).logits[:, :-1]
        total -= float(token_logprobs(logits[learned], labels[learned]).double().sum())
        count += int(learned.sum())
    return total / count


class _Trainer(Trainer):
    """transformers' own, which would leave a loss that is not finite out of its average and go on."""

    loss = math.nan
    """Of the last step."""

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*args, **options)
        self.loss = float(loss)
        _require_finite(self.loss, f"step {self.state.global_step + 1}")
        return loss


class _Shown(TrainerCallback):
    """Shows the steps as every command of this package does."""

    def __init__(self, display: ProgressDisplay, trainer: _Trainer) -> None:
        self.display, self.trainer = display, trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.display.phase("update")

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.display.update(state.global_step, loss=self.trainer.loss)


def _require_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise NonFiniteGradientError(f"{where}: the loss is {loss}, so nothing was saved; lower learning_rate")


def _stop_at(model: PreTrainedModel, end: int) -> None:
    """Let the generation config, which says where responses end, name the end token that was taught."""
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    named = model.generation_config.eos_token_id
    others = [named] if isinstance(named, int) else list(named or [])
    if end not in others:
        model.generation_config.eos_token_id = [end, *others] if others else end


def sft(args: SFTArgs) -> dict[str, float]:
    """Train, save to ``args.output_dir``, and return the held-out loss (nats per learned token) and perplexity.

    Raises:
        ValueError: bad settings, data or model, or another run is writing into ``output_dir``; says which.
        NonFiniteGradientError: a loss or a weight is not finite; nothing is saved.
        SavedModelError: what was saved is another model than the one that was trained.
    """
    require_one_process()
    with run_lock(RunDirectory(args.output_dir).path), without_library_bars():
        return _train(args)


def _train(args: SFTArgs) -> dict[str, float]:
    torch.manual_seed(args.seed)
    rows = load_mixture(args.dataset, args.split, weights=args.dataset_weights, seed=args.seed)
    if len(rows) < 2:
        raise ValueError(f"{args.dataset} has {len(rows)} row; at least 2 are needed, one of them held out")
    parts = {name: read_examples(part, args) for name, part in hold_out(rows, args).items()}
    texts = [prompt + answer for prompt, answer, _ in parts["train"] if isinstance(prompt, str)]
    config, tokenizer = _settle_tokenizer(args, texts)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {args.model} names no end-of-text token, which ends every row: give it one")
    longest = min(args.max_length, context_length(config) or args.max_length)
    vocab_size = vocabulary_size(config)
    encoded = {
        name: encode_examples(part, tokenizer, longest, name, vocab_size=vocab_size) for name, part in parts.items()
    }
    name = args.model
    model = AutoModelForCausalLM.from_config(config) if name is None else load_policy(resolve_model(name))
    require_decoder(model)
    require_space(args.output_dir, saved_bytes(model, adapted=False), f"the model that is saved into {args.output_dir}")
    steps = math.ceil(args.num_epochs * math.ceil(len(encoded["train"]) / args.batch_size))
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.num_epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=fit_warmup(args.warmup_steps, steps, quiet=args.quiet),
            weight_decay=args.weight_decay,
            train_sampling_strategy="group_by_length",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=encoded["train"],
        data_collator=_collate,
    )
    trainer.remove_callback(PrinterCallback)
    with torch_threads(args.num_threads, model):
        print_summary(
            {
                **model_rows(str(args.model or args.architecture), model, device=trainer.args.device, bf16=False),
                "rows": f"{len(encoded['train'])} train, {len(encoded['test'])} held out",
                "run": f"{steps} optimizer steps of {args.batch_size} rows",
                "folder": args.output_dir,
            },
            quiet=args.quiet,
        )
        with ProgressDisplay("steps", steps, each="step", quiet=args.quiet) as progress:
            trainer.add_callback(_Shown(progress, trainer))
            trainer.train()
            with progress.aside("evaluating"):
                loss = nats_per_token(model, encoded["test"], args.batch_size)
    _require_finite(loss, f"after the last step ({steps}), on the held-out rows")
    model.config.use_cache = True  # the Trainer turns it off and leaves it so
    _stop_at(model, cast(int, tokenizer.eos_token_id))
    round_weights(model.parameters(), getattr(torch, args.save_dtype))
    if broken := nonfinite_parameters(model):
        raise NonFiniteGradientError(
            f"after the last step ({steps}) {broken[0]} is not finite in {args.save_dtype}, so nothing was saved; "
            "lower learning_rate"
        )
    save_or_rescue(
        args.output_dir,
        lambda new: (model.save_pretrained(new), tokenizer.save_pretrained(new)),
        needed=saved_bytes(model, adapted=False),
    )
    require_saved(Path(args.output_dir), probe_logits(model.float()), load_policy)
    return {"eval/loss_nats_per_token": loss, "eval/perplexity": math.exp(loss) if loss < 700 else math.inf}


def sft_command(args: SFTArgs) -> None:
    """Run the `sft` command."""
    for name, value in sft(args).items():
        print(f"{name}  {value:.4g}")
    print(f"model    {args.output_dir}")
