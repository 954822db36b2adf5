"""CLIP's tokenizer: texts to rows of token ids."""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zegformer_jax.runtime import hugging_face
from zegformer_jax.runtime.assets import DATA
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.cleaning import clean_text

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
CONTEXT_LENGTH = 77  # openai/CLIP clip.py, tokenize
OPENAI_MERGES = 49152 - 256 - 2  # openai/CLIP simple_tokenizer.py
BYTES = 256
END_OF_WORD = "</w>"
# openai/CLIP simple_tokenizer.py; a word is letters, one digit, or other signs. The original
# ignores case. In lower-case texts this matters for the long s and for U+0345, which never matches.
WORD_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"
)
VOCABULARY_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


class Tokenizer:
    """CLIP's byte-level BPE tokenizer: texts to rows of token ids.

    transformers' CLIPTokenizer reads, makes and writes the vocabulary. It is not used to encode,
    since its ids differ from OpenAI's for some texts: it neither repairs texts with ftfy (wrongly
    decoded text, curly quotes, ligatures, control characters) nor unescapes HTML entities, and its
    word pattern is case-sensitive. Texts are therefore cleaned as by openai/CLIP's `basic_clean`
    and `whitespace_clean`, and split by its pattern.

    Attributes:
        context_length: The length of a row.
        start_id: Id of `<|startoftext|>`.
        end_id: Id of `<|endoftext|>`.
        vocab_size: The number of tokens.
    """

    def __init__(self, published: Any):
        """Wraps a tokenizer of transformers.

        Args:
            published: A `transformers.CLIPTokenizer`.

        Raises:
            UserError: Its vocabulary lacks one of CLIP's two special tokens, or an id.
        """
        model = published.backend_tokenizer.model
        where = published.name_or_path or "tokenizer"
        self.start_id = model.token_to_id(START_TOKEN)
        self.end_id = model.token_to_id(END_TOKEN)
        if self.start_id is None or self.end_id is None:
            raise UserError(
                f"{where}: its vocabulary lacks {START_TOKEN} or {END_TOKEN}: not CLIP's tokenizer"
            )
        self._published = published
        self._backend = _backend(model)
        self.context_length = int(published.model_max_length)
        ids = sorted(self._backend.get_vocab().values())
        self.vocab_size = len(ids)
        if ids != list(range(self.vocab_size)):  # the ids are rows of the token embedding
            raise UserError(
                f"{where}: the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}: get the "
                "published file again"
            )

    @classmethod
    def from_directory(cls, directory: str | Path, context_length: int) -> "Tokenizer":
        """Reads a Hugging Face directory: `tokenizer.json`, or `vocab.json` and `merges.txt`.

        Args:
            directory: The directory that holds the files.
            context_length: The length of a row.

        Raises:
            MissingFile: Both are missing.
            UserError: The files cannot be read, or belong to another tokenizer than CLIP's.
        """
        directory = Path(directory)
        if not any(all((directory / x).is_file() for x in names) for names in VOCABULARY_FILES):
            raise MissingFile(
                f"{directory}: neither tokenizer.json nor vocab.json and merges.txt is there"
            )
        reader = hugging_face.load_transformers().CLIPTokenizer
        with hugging_face.errors_in_one_line(directory, "tokenizer"):
            published = reader.from_pretrained(
                directory, local_files_only=True, model_max_length=context_length
            )
        return cls(published)

    @classmethod
    def openai(cls, context_length: int = CONTEXT_LENGTH) -> "Tokenizer":
        """Reads OpenAI's vocabulary, 49408 tokens, from `data/clip_vocab`.

        Args:
            context_length: The length of a row.
        """
        path = DATA / "clip_vocab" / "bpe_simple_vocab_16e6.txt.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            merges = [tuple(line.split()) for line in lines.read().split("\n")[1:]]
        return cls(_published(merges[:OPENAI_MERGES], context_length))

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Returns token ids, int32 [N, context_length]: start, the text, end, zeros.

        Raises:
            UserError: A text has too many tokens; the message names the first one.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = np.zeros((len(texts), self.context_length), np.int32)
        cleaned = [clean_text(text) for text in texts]
        encodings = self._backend.encode_batch(cleaned, add_special_tokens=False)
        for row, text, encoding in zip(rows, texts, encodings, strict=True):
            ids = [self.start_id, *encoding.ids, self.end_id]
            if len(ids) > self.context_length:
                raise UserError(
                    f"'{text}' has {len(ids)} tokens, at most {self.context_length} fit: shorten it"
                )
            row[: len(ids)] = ids
        return rows

    def save(self, directory: str | Path) -> None:
        """Writes the files that transformers' CLIPTokenizer and `from_directory` read.

        Args:
            directory: Receives the files; it is made if it is missing.
        """
        self._published.save_pretrained(directory)
        self._published.backend_tokenizer.model.save(str(directory))  # vocab.json, merges.txt


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, context_length: int = CONTEXT_LENGTH
) -> Tokenizer:
    """Trains a tokenizer of CLIP's kind, for a small CLIP. Equal texts give equal tokenizers.

    The ids are in OpenAI's order: 256 bytes, 256 bytes that end a word, merges, start, end.

    Args:
        texts: The texts whose pairs of tokens are counted.
        vocab_size: The number of tokens; fewer if the texts have no more pairs.
        context_length: The length of a row.

    Raises:
        UserError: Vocab_size has no room for the bytes and the special tokens.
    """
    from tokenizers import trainers

    merge_count = vocab_size - 2 * BYTES - 2
    if merge_count < 0:
        raise UserError(f"vocab_size {vocab_size}: CLIP's tokenizer has at least {2 * BYTES + 2}")
    backend = _backend(_published([], context_length).backend_tokenizer.model)
    characters = list(_byte_characters())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        show_progress=False,
        initial_alphabet=characters,
        # Of equally frequent pairs, the one with the smaller ids is merged first. Without this,
        # characters that end a word get their ids in the random order of a hash table.
        special_tokens=[character + END_OF_WORD for character in characters],
        end_of_word_suffix=END_OF_WORD,
    )
    backend.train_from_iterator((clean_text(text) for text in texts), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return Tokenizer(_published(merges[:merge_count], context_length))


def _byte_characters() -> str:
    """Returns the character of each byte, in the order of CLIP and GPT-2."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return "".join(chr(x) for x in (*visible, *range(BYTES, 2 * BYTES - len(visible))))


def _published(merges: Sequence[tuple[str, str]], context_length: int) -> Any:
    """Makes transformers' CLIPTokenizer from merges, with ids in OpenAI's order."""
    characters = _byte_characters()
    tokens = [*characters, *(x + END_OF_WORD for x in characters)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START_TOKEN, END_TOKEN]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return hugging_face.load_transformers().CLIPTokenizer(
        vocab=vocab, merges=list(merges), model_max_length=context_length
    )


def _backend(model: Any) -> Any:
    """Makes a `tokenizers.Tokenizer` that splits cleaned texts as OpenAI's does."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens([START_TOKEN, END_TOKEN])
    return backend
