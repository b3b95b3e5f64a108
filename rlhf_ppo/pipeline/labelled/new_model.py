"""A new language model for sft: its configuration, and a tokenizer trained on the text."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from rlhf_ppo.models.loading import context_length, refuse_encoder_decoder
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup

END_OF_TEXT = "<|endoftext|>"


def new_model(
    architecture: str, texts: list[str], max_length: int, processes: ProcessGroup
) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Load the configuration of a new model, and train its tokenizer."""
    if architecture.endswith(".json") and not Path(architecture).is_file():
        raise FileNotFoundError(f"architecture {architecture}: there is no such file")
    config = AutoConfig.from_pretrained(architecture, trust_remote_code=False)
    refuse_encoder_decoder(config, f"architecture {architecture}", "name a decoder's (GPT-2, Llama, Qwen, ...)")
    tokenizer = train_tokenizer(texts, config.vocab_size, context_length(config) or max_length, processes)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"architecture {architecture} has vocab_size={config.vocab_size}, but every byte and end of text make "
            f"{len(tokenizer)} tokens: raise it"
        )
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return config, tokenizer


def train_tokenizer(
    texts: list[str], vocab_size: int, max_length: int, processes: ProcessGroup = ALONE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE like GPT-2's, on the first process; end of text is its only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def train() -> str:
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
        return tokenizer.to_str()

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(processes.on_first(train)),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
