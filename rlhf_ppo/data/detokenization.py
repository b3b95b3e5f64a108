"""Text in pieces: token ids to text, and text to token ids, where other tokens lie before, and special tokens around.

A tokenizer reads and writes whole texts. Many drop the space before the first word, or put one there; some spread a
character over several tokens. So a piece is decoded behind what precedes it, and is what has come to the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

_LONGEST_CHARACTER = 4
"""Bytes, and so tokens, of a character in UTF-8."""
_UNFINISHED = "\ufffd"
"""What stands for bytes that are no character, or not yet."""
_HEADS = ("\n", ".", "x", "0")
"""Texts to encode a piece behind, in search of one that the tokenizer does not merge with it."""


class Before(NamedTuple):
    """What lies before a piece of text."""

    ids: Sequence[int] = ()
    lost_space: bool = False
    """Its text ends with white space that its ids do not hold: the first space of the piece stands for it."""


class TextPieces:
    """Decodes and encodes pieces of text with a tokenizer, which must not change meanwhile."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> None:
        """``special``: special tokens are text, too; otherwise they are left out."""
        self.tokenizer, self.special = tokenizer, special
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._hidden = frozenset() if special else added | set(tokenizer.all_special_ids)
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        # Bytes in a row become text together, or are all of them invalid.
        ids = cast(list[int | None], tokenizer.convert_tokens_to_ids(names))
        self._bytes = frozenset(i for i in ids if i is not None and i != tokenizer.unk_token_id)
        # Tokenizers in Python fail on other ids, or write them as an unknown word; those in Rust leave them out.
        self._vocabulary = None if tokenizer.is_fast else frozenset(tokenizer.get_vocab().values())
        self._local = _is_local(tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids that begin a sequence; an embedding beyond the vocabulary has none."""
        ids = [i for i in ids if self._has_token(i)]
        if not ids:
            return ""
        # Tidying spaces would change text across the border of two pieces.
        options = {"skip_special_tokens": not self.special, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **options))

    def _has_token(self, token: int) -> bool:
        """Whether an id has a token: embeddings are often rounded up, and a model may sample what lies beyond."""
        if self._vocabulary is not None:
            return int(token) in self._vocabulary
        return cast(Any, self.tokenizer).backend_tokenizer.id_to_token(int(token)) is not None

    def before(self, ids: Sequence[int], text: Any = None) -> Before:
        """What lies before a piece: ids and what they were made from, if that was text."""
        spaced = isinstance(text, str) and text[-1:].isspace()
        return Before(ids, spaced and not self.decode(Before(ids[:-1]), ids[-1:])[-1:].isspace())

    def decode(self, before: Before, ids: Sequence[int]) -> str:
        """The text that ids add to what lies before them."""
        window = self._window(before.ids)
        start, whole = self.text(window), self.text([*window, *ids])
        piece = whole[shared(start, whole) :]
        return piece.removeprefix(" ") if before.lost_space else piece

    def encode(self, before: Before, text: str) -> list[int]:
        """Ids that decode to ``text`` behind what lies before them, or come as close as the tokenizer can."""
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
        """The shortest end of the ids behind which any piece decodes as it does behind all of them."""
        if self._local:
            for start in range(len(ids) - 1, -1, -1):
                # A token that is left out is not there for the decoder, and a character must be whole.
                if ids[start] in self._hidden or ids[start] in self._bytes or not self._has_token(ids[start]):
                    continue
                if not self.text(ids[start:]).startswith(_UNFINISHED):
                    return ids[start:]
        return ids


def before_each(pieces: TextPieces, texts: Sequence[Any], ids: Tensor, mask: Tensor) -> list[Before]:
    """What each of B responses lies behind: its prompt's ids [B, P] and, where the prompt was text, that text."""
    rows = zip(texts, ids, mask, strict=True)
    return [pieces.before(row[keep].tolist(), text) for text, row, keep in rows]


class GrowingText:
    """The text of a sequence as token after token is added, decoded behind a few tokens each time."""

    def __init__(self, pieces: TextPieces, before: Before, *, keep: int | None = None) -> None:
        """Start with nothing behind ``before``; ``keep``: so many of the last characters are wanted; None: all."""
        self._pieces, self._keep = pieces, keep
        self._window, self._new = [*pieces._window(before.ids)], []
        self._settled, self._lost_space = "", before.lost_space

    def add(self, token: int) -> str:
        """The text, or its end, with one more token; bytes that are no whole character yet may still change."""
        pieces = self._pieces
        self._new.append(token)
        start, whole = pieces.text(self._window), pieces.text(self._window + self._new)
        same = shared(start, whole)
        piece = whole[same:].removeprefix(" ") if self._lost_space else whole[same:]
        text = self._settled[: max(0, len(self._settled) - (len(start) - same))] + piece
        waits = piece.endswith(_UNFINISHED) and len(self._new) < _LONGEST_CHARACTER
        if piece and not waits and token not in pieces._bytes:
            self._window = self._new if pieces._local else self._window + self._new
            self._new, self._lost_space = [], False
            # Four more, for a character that was taken for invalid and turns out to be whole.
            self._settled = text if self._keep is None else text[max(0, len(text) - self._keep - _LONGEST_CHARACTER) :]
        return text


def _words(text: str) -> tuple[bool, list[str]]:
    """What is left of a text for a tokenizer that knows neither case nor one space from two."""
    return text[:1].isspace(), text.lower().split()


def shared(one: str, two: str) -> int:
    """Characters at the beginning that are the same in both."""
    if two.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _is_local(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a piece's text depends on nothing but the bytes of its own characters and on what begins the sequence."""
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


def encode_bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text alone, with no special tokens but those that it spells out."""
    return list(cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))


def encode_after(tokenizer: PreTrainedTokenizerBase, head: str, text: str) -> list[int] | None:
    """The ids of ``text`` in the encoding of ``head + text``, or None where the two are merged."""
    before, both = encode_bare(tokenizer, head), encode_bare(tokenizer, head + text)
    return both[len(before) :] if both[: len(before)] == before else None


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, ended: bool, limit: int | None = None) -> list[int]:
    """The ids of a text that begins a sequence, with the special tokens that the tokenizer puts around a text.

    Special tokens that the text spells out at its ends are not put there a second time.

    Args:
        ended: with the special tokens at the end as well; False: something follows.
        limit: most tokens; more lose those at the beginning, but no special token.
    """
    body = encode_bare(tokenizer, text)
    start, end = _around(tokenizer, text)
    end = end if ended else []
    body = body[len(start) :] if body[: len(start)] == start else body
    body = body[: len(body) - len(end)] if end and body[-len(end) :] == end else body
    room = len(body) if limit is None else max(0, limit - len(start) - len(end))
    return [*start, *body[max(0, len(body) - room) :], *end]


def _around(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text; its first characters are enough to see."""
    part = text[:32] if encode_bare(tokenizer, text[:32]) else text
    body = encode_bare(tokenizer, part)
    whole = list(cast(list[int], tokenizer(part, verbose=False)["input_ids"]))
    place = next((i for i in range(len(whole) - len(body) + 1) if whole[i : i + len(body)] == body), 0)
    return whole[:place], whole[place + len(body) :]
