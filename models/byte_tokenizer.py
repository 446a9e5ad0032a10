"""The tokenizer.json of a model whose tokens are the 256 bytes, for `transformers`.

It is a byte-level BPE (Radford et al. 2019) without merges, whose token of each byte is its number.
"""

from typing import Any

END = "\0"  # the token 0, at which records end


def byte_tokenizer() -> dict[str, Any]:
    """The content of that file.

    Byte 0 is a token of its own text, so that the file names the end of records by it. Bytes that
    are no UTF-8 decode to U+FFFD.
    """
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False
    }  # fmt: skip
    end = {
        "id": 0, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": _vocabulary(), "merges": [],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level, "model": model,
    }  # fmt: skip


def is_of_bytes(tokenizer: dict[str, Any]) -> bool:
    """Whether the content of a tokenizer.json says that tokens are bytes, as `byte_tokenizer`."""
    ours, model = byte_tokenizer(), tokenizer.get("model")
    added = tokenizer.get("added_tokens")
    return (
        isinstance(model, dict)
        and (model.get("vocab"), model.get("merges")) == (ours["model"]["vocab"], [])
        and isinstance(added, list)
        and [(t.get("id"), t.get("content")) for t in added if isinstance(t, dict)] == [(0, END)]
    )


def _vocabulary() -> dict[str, int]:
    """The byte of each token's name: byte-level BPE writes a byte as a character that shows, its
    own in Latin-1 or else one from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    names = {chr(byte): byte for byte in shown}
    names |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    del names[chr(256)]  # of byte 0, which is END
    return dict(sorted((names | {END: 0}).items(), key=lambda item: item[1]))
