"""Atlas's tokenizer: byte-level BPE in which the words of the world are single tokens.

Text is split as GPT-4's tokenizer does, but digits go in groups of two (" 17", "32"), so that a year is a century and a
year within it. A world word (a name, a city, a colour) is made a single token by repeating it in the sample that the
merges are counted on: then an entity has one position, and can be patched there.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cutaway.subjects.atlas.shipped import atlas_folder

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS, PAD, ASSISTANT, END = 0, 1, 4, 5
VOCABULARY = 8192

_SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REPEATS = 400  # of each word that must be one token


def train_tokenizer(texts: Iterable[str], words: Sequence[str] = (), vocabulary: int = VOCABULARY) -> Tokenizer:
    """Learn byte-level BPE merges from `texts`; `words`, each after a space, become single tokens.

    The vocabulary is the six specials (ids 0 to 5), the 256 bytes and the merges. Deterministic. `split_words` tells
    which words stayed in pieces because the vocabulary was too small for them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts, words), trainer)
    return tokenizer


def _sample(texts: Iterable[str], words: Sequence[str]) -> Iterator[str]:
    yield from texts
    for word in words:
        yield f" {word}" * _REPEATS


def split_words(tokenizer: Tokenizer, words: Sequence[str]) -> list[str]:
    """The words that are not a single token after a space."""
    return [word for word in words if len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) != 1]


def save_pretrained(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face tokenizer: plain text gets beginning-of-text, chats the shipped template.

    The template writes beginning-of-text itself, and Hugging Face renders it without special tokens of the tokenizer's
    own, so a chat has exactly one.
    """
    from transformers import PreTrainedTokenizerFast  # here: the processes that write the corpus do not need it

    whole = Tokenizer.from_str(tokenizer.to_str())
    bos = SPECIALS[BOS]
    whole.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token=bos,
        eos_token=SPECIALS[END],
        pad_token=SPECIALS[PAD],
        extra_special_tokens=list(SPECIALS[2:5]),
    ).save_pretrained(str(folder))
    shutil.copyfile(atlas_folder() / "chat_template.jinja", folder / "chat_template.jinja")
