"""Incremental detokenization: the text that tokens add to the tokens before them, and its inverse.

A tokenizer reads and writes whole texts. Many drop or add a space before the first word; some spread a character over
several tokens. So a piece is decoded together with what precedes it, and its text is what that adds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.tokenization import encode_after, encode_bare

_LONGEST_CHARACTER = 4
"""Most bytes, and so tokens, of a character in UTF-8."""
_UNFINISHED = "\ufffd"
"""The replacement character: bytes that are not (yet) a character."""
_HEADS = ("\n", ".", "x", "0")
"""Texts to encode a piece after, until the tokenizer merges one with it no longer."""


class Before(NamedTuple):
    """What precedes a piece of text."""

    ids: Sequence[int] = ()
    lost_space: bool = False
    """The text before ends with white space that its ids have lost: the piece's first space replaces it."""


class TextPieces:
    """Decode and encode pieces of text with a tokenizer, which must not change meanwhile."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> None:
        """Prepare the tokenizer; ``special``: decode special tokens as text instead of skipping them."""
        self.tokenizer, self.special = tokenizer, special
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._hidden = frozenset() if special else added | set(tokenizer.all_special_ids)
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        # Consecutive byte tokens become text together, or are all invalid.
        ids = cast(list[int | None], tokenizer.convert_tokens_to_ids(names))
        self._bytes = frozenset(i for i in ids if i is not None and i != tokenizer.unk_token_id)
        # Slow tokenizers fail on ids beyond the vocabulary, or decode them as an unknown word; fast ones skip them.
        self._vocabulary = None if tokenizer.is_fast else frozenset(tokenizer.get_vocab().values())
        self._local = _is_local(tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """Decode ids that begin a sequence; ids beyond the vocabulary have no text."""
        ids = [i for i in ids if self._has_token(i)]
        if not ids:
            return ""
        # Cleaning up spaces would change text across the border of two pieces.
        options = {"skip_special_tokens": not self.special, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **options))

    def _has_token(self, token: int) -> bool:
        """Whether an id has a token: embeddings are often padded, and a model may sample the padding."""
        if self._vocabulary is not None:
            return int(token) in self._vocabulary
        return cast(Any, self.tokenizer).backend_tokenizer.id_to_token(int(token)) is not None

    def before(self, ids: Sequence[int], text: Any = None) -> Before:
        """Describe what precedes a piece: its ids, and the text that they were encoded from, if any."""
        spaced = isinstance(text, str) and text[-1:].isspace()
        return Before(ids, spaced and not self.decode(Before(ids[:-1]), ids[-1:])[-1:].isspace())

    def decode(self, before: Before, ids: Sequence[int]) -> str:
        """Return the text that ids add to what precedes them."""
        window = self._window(before.ids)
        start, whole = self.text(window), self.text([*window, *ids])
        piece = whole[common_prefix_length(start, whole) :]
        return piece.removeprefix(" ") if before.lost_space else piece

    def encode(self, before: Before, text: str) -> list[int]:
        """Encode ``text`` so that it decodes to itself after ``before``, or as close to it as the tokenizer can."""
        close: list[int] | None = None
        for ids in self._candidates(before, text):
            read = self.decode(before, ids)
            if read == text:
                return ids
            if close is None and _words(read) == _words(text):
                close = ids
        return encode_bare(self.tokenizer, text) if close is None else close

    def _candidates(self, before: Before, text: str) -> Iterator[list[int]]:
        yield encode_bare(self.tokenizer, text)
        for head in (self.text(self._window(before.ids)), *_HEADS):
            if (ids := encode_after(self.tokenizer, head, text)) is not None:
                yield ids

    def _window(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the shortest end of the ids after which any piece decodes as it does after all of them."""
        if self._local:
            for start in range(len(ids) - 1, -1, -1):
                # The decoder does not see skipped tokens, and the window must begin with a whole character.
                if ids[start] in self._hidden or ids[start] in self._bytes or not self._has_token(ids[start]):
                    continue
                if not self.text(ids[start:]).startswith(_UNFINISHED):
                    return ids[start:]
        return ids


def before_each(pieces: TextPieces, texts: Sequence[Any], ids: Tensor, mask: Tensor) -> list[Before]:
    """Describe what precedes each of B responses: its prompt's ids [B, P] and, for a text prompt, the text."""
    rows = zip(texts, ids, mask, strict=True)
    return [pieces.before(row[keep].tolist(), text) for text, row, keep in rows]


class GrowingText:
    """The text of a sequence that grows token by token; each step decodes a few tokens."""

    def __init__(self, pieces: TextPieces, before: Before, *, keep: int | None = None) -> None:
        """Start empty after ``before``; ``keep``: return at least this many of the last characters; None: all."""
        self._pieces, self._keep = pieces, keep
        self._window, self._new = [*pieces._window(before.ids)], []
        self._settled, self._lost_space = "", before.lost_space

    def add(self, token: int) -> str:
        """Add a token and return the text, or its end; bytes of an unfinished character may still change."""
        pieces = self._pieces
        self._new.append(token)
        start, whole = pieces.text(self._window), pieces.text(self._window + self._new)
        same = common_prefix_length(start, whole)
        piece = whole[same:].removeprefix(" ") if self._lost_space else whole[same:]
        text = self._settled[: max(0, len(self._settled) - (len(start) - same))] + piece
        waits = piece.endswith(_UNFINISHED) and len(self._new) < _LONGEST_CHARACTER
        if piece and not waits and token not in pieces._bytes:
            self._window = self._new if pieces._local else self._window + self._new
            self._new, self._lost_space = [], False
            # Four more, for a character that looked invalid and turns out to be whole.
            self._settled = text if self._keep is None else text[max(0, len(text) - self._keep - _LONGEST_CHARACTER) :]
        return text


def _words(text: str) -> tuple[bool, list[str]]:
    """Normalise case and spaces away, as some tokenizers do."""
    return text[:1].isspace(), text.lower().split()


def common_prefix_length(one: str, two: str) -> int:
    """Count the characters that two texts have in common at the beginning."""
    if two.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _is_local(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a piece's text depends only on the bytes of its own characters and on where the sequence begins."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return False
    decoder: dict[str, Any] | None = None if core.decoder is None else json.loads(core.decoder.__getstate__())
    if decoder is None:
        return True
    fused = False
    for part in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        kind = part["type"]
        fused |= kind == "Fuse"
        if kind == "Strip" and part["start"] <= 1:
            continue
        if kind == "Replace" and not fused:
            continue
        if kind not in ("ByteLevel", "Metaspace", "WordPiece", "BPEDecoder", "ByteFallback", "Fuse"):
            return False
    return True
