"""The table of token vectors: which modules share it, and room for new words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .sites import at, bare, sites


def ties(model: nn.Module, path: str) -> list[str]:
    """The bare paths of all modules that share the weight of the one at `path`, itself among them, in model order."""
    weight = bare(at(model, path)).weight
    return [other for other, site in sites(model).items() if getattr(bare(site), "weight", None) is weight]


def add_tokens(model: nn.Module, tokenizer, words: Sequence[str]) -> list[int]:
    """Make room for new words in tokenizer and model, in place; returns their ids, for `TrainableTokens`.

    The table of vectors grows if it has no rows to spare; the new rows are the mean of the others, so that at first the
    new words are hardly ever said. Source: Hewitt 2021, "Initializing new word embeddings".
    Raises ValueError for a word that the tokenizer has already, or if adapters sit on the table; then nothing changed.
    """
    from .attach import hosts

    known = tokenizer.get_vocab()
    if there := [word for word in words if word in known]:
        raise ValueError(f"{there[0]!r} is in the vocabulary already, as token {known[there[0]]}; train that one")
    if hosts(model):
        raise ValueError("adapters are attached, and a table that grows is a new one; add the tokens first")
    tokenizer.add_tokens(list(words))
    rows = len(model.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if table is not None:  # of tied ones, the second writes the same
                table.weight.data[rows:] = table.weight.data[:rows].mean(0)
    return tokenizer.convert_tokens_to_ids(list(words))
