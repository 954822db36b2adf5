"""Words to vectors: CLIP's tokenizer, prompt templates, and a vocabulary's text embeddings."""

import gzip
import html
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from zegformer_jax.runtime.assets import DATA

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
CONTEXT_LENGTH = 77  # openai/CLIP clip.py, tokenize
OPENAI_MERGES = 49152 - 256 - 2  # openai/CLIP simple_tokenizer.py
BYTES = 256
END_OF_WORD = "</w>"
# openai/CLIP simple_tokenizer.py; a word is letters, or one digit, or other signs. That pattern
# ignores case; of lower-case texts this concerns the long s, and U+0345, which it never matches.
WORD_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"
)
LENGTH_STEP = 16  # token arrays are cut to a multiple of this: few shapes to compile for
ROW_STEP = 32  # and a short batch is filled to a multiple of this


class Tokenizer:
    """CLIP's byte-level BPE tokenizer: texts to rows of token ids.

    Texts are cleaned as in openai/CLIP's ``basic_clean`` and ``whitespace_clean``: repaired by
    ftfy (wrongly decoded text, curly quotes, ligatures, control characters), HTML entities
    unescaped twice, white space collapsed, lower case. transformers' tokenizer reads the same
    files but, without ftfy, gives other ids for such texts.

    Attributes:
      context_length: the length of a row.
      start_id: id of ``<|startoftext|>``.
      end_id: id of ``<|endoftext|>``.
      vocab_size: the number of tokens.
    """

    def __init__(self, backend, context_length: int = CONTEXT_LENGTH):
        """Wraps a ``tokenizers.Tokenizer`` that has both special tokens.

        Raises ValueError where it has not.
        """
        from tokenizers import normalizers

        self._backend = backend
        self._backend.normalizer = normalizers.Sequence([])  # texts come cleaned
        self.context_length = context_length
        self.start_id = backend.token_to_id(START_TOKEN)
        self.end_id = backend.token_to_id(END_TOKEN)
        if self.start_id is None or self.end_id is None:
            raise ValueError(f"the tokenizer lacks {START_TOKEN} or {END_TOKEN}: not CLIP's")
        self.vocab_size = backend.get_vocab_size()

    @classmethod
    def from_directory(
        cls, directory: str | Path, context_length: int | None = None
    ) -> "Tokenizer":
        """Reads a Hugging Face directory: ``tokenizer.json``, or ``vocab.json`` + ``merges.txt``.

        ``context_length`` None takes ``model_max_length`` of ``tokenizer_config.json``, else 77.
        Raises FileNotFoundError where neither is there.
        """
        import tokenizers

        directory = Path(directory)
        if (directory / "tokenizer.json").is_file():
            backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            backend.no_truncation()
            backend.no_padding()
        elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [tuple(x.split()) for x in lines if x and not x.startswith("#version")]
            vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
            backend = _clip_backend(vocab, merges)
        else:
            raise FileNotFoundError(
                f"{directory}: neither tokenizer.json nor vocab.json and merges.txt is there"
            )
        if context_length is None:
            config = directory / "tokenizer_config.json"
            fields = json.loads(config.read_text()) if config.is_file() else {}
            context_length = int(fields.get("model_max_length", CONTEXT_LENGTH))
        return cls(backend, context_length)

    @classmethod
    def openai(
        cls, path: str | Path | None = None, context_length: int = CONTEXT_LENGTH
    ) -> "Tokenizer":
        """Reads OpenAI's vocabulary, 49408 tokens, from ``bpe_simple_vocab_16e6.txt.gz``.

        ``path`` None is the copy in ``data/clip_vocab``. Raises FileNotFoundError.
        """
        path = Path(path or DATA / "clip_vocab" / "bpe_simple_vocab_16e6.txt.gz")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            merges = [tuple(line.split()) for line in lines.read().split("\n")[1:]]
        merges = merges[:OPENAI_MERGES]
        return cls(_clip_backend(_clip_vocab(merges), merges), context_length)

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Gives token ids, int32 [N, context_length]: start, the text, end, zeros.

        Raises ValueError naming the first text that has too many tokens.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = np.zeros((len(texts), self.context_length), np.int32)
        cleaned = [_clean(text) for text in texts]
        encodings = self._backend.encode_batch(cleaned, add_special_tokens=False)
        for row, text, encoding in zip(rows, texts, encodings, strict=True):
            ids = [self.start_id, *encoding.ids, self.end_id]
            if len(ids) > self.context_length:
                raise ValueError(
                    f"'{text}' has {len(ids)} tokens, at most {self.context_length} fit: shorten it"
                )
            row[: len(ids)] = ids
        return rows

    def save(self, directory: str | Path) -> None:
        """Writes the files that transformers' CLIPTokenizer and ``from_directory`` read."""
        import tokenizers

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.normalizer = _transformers_normaliser()
        backend.save(str(directory / "tokenizer.json"))
        self._backend.model.save(str(directory))  # vocab.json and merges.txt
        special = {
            "bos_token": START_TOKEN,
            "eos_token": END_TOKEN,
            "unk_token": END_TOKEN,
            "pad_token": END_TOKEN,
        }
        config = special | {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context_length,
            "do_lower_case": True,
        }
        for name, fields in (("tokenizer_config", config), ("special_tokens_map", special)):
            (directory / f"{name}.json").write_text(json.dumps(fields, indent=2) + "\n")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, context_length: int = CONTEXT_LENGTH
) -> Tokenizer:
    """Makes a tokenizer of CLIP's kind from texts, for a small CLIP. The same from the same texts.

    The ids are laid out as OpenAI's: 256 bytes, 256 bytes that end a word, merges, start, end.
    There are fewer than ``vocab_size`` where the texts have no more pairs to merge.
    Raises ValueError where vocab_size has no room for the bytes and the special tokens.
    """
    from tokenizers import trainers

    merge_count = vocab_size - 2 * BYTES - 2
    if merge_count < 0:
        raise ValueError(f"vocab_size {vocab_size}: CLIP's tokenizer has at least {2 * BYTES + 2}")
    backend = _clip_backend(_clip_vocab([]), [])
    characters = list(_byte_characters())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        show_progress=False,
        initial_alphabet=characters,
        # Of pairs that are as frequent the one with the smaller ids is merged first. Characters
        # that end a word would get theirs in the random order of a hash table.
        special_tokens=[character + END_OF_WORD for character in characters],
        end_of_word_suffix=END_OF_WORD,
    )
    backend.train_from_iterator((_clean(text) for text in texts), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    merges = merges[:merge_count]
    return Tokenizer(_clip_backend(_clip_vocab(merges), merges), context_length)


def load_templates(name: str) -> tuple[str, ...]:
    """Gives a set of prompt templates of ``data/prompts.json``; ``{}`` stands for the class.

    Raises ValueError naming the sets that exist.
    """
    path = DATA / "prompts.json"
    sets = json.loads(path.read_text(encoding="utf-8"))
    if name not in sets:
        raise ValueError(f"{path}: no prompt set '{name}'; there are {', '.join(sorted(sets))}")
    return tuple(sets[name])


def text_embeddings(
    encode_text: Callable[[np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> np.ndarray:
    """Embeds class names: `tokenize_classes`, then `embed_tokens`."""
    return embed_tokens(encode_text, tokenize_classes(tokenizer, names, templates), batch_size)


def tokenize_classes(
    tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str]
) -> list[np.ndarray]:
    """Gives the token ids of each class, int32 [N, T]: all its synonyms in all templates.

    Args:
      tokenizer: texts to token ids.
      names: C class names; "sofa, couch" is two synonyms.
      templates: prompts with ``{}`` where the synonym goes.

    Raises ValueError naming the class where it has no name or a text is too long.
    """
    texts = [_class_texts(name, templates) for name in names]
    return [_class_tokens(tokenizer, *x) for x in zip(names, texts, strict=True)]


def embed_tokens(
    encode_text: Callable[[np.ndarray], np.ndarray],
    tokens: Sequence[np.ndarray],
    batch_size: int = 256,
) -> np.ndarray:
    """Embeds classes: the normalised mean over a class's texts of normalised features.

    Args:
      encode_text: token ids int32 [N, T], T <= context length, to features [N, D].
      tokens: of each class, see `tokenize_classes`.
      batch_size: the largest N; a short batch is filled up to a multiple of 32.

    Returns float32 [C, D], rows of length 1 (CLIP, section 3.1.4).
    """
    features = _encode_in_batches(encode_text, np.concatenate(tokens), batch_size)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    ends = np.cumsum([len(group) for group in tokens])
    means = np.stack([group.mean(axis=0) for group in np.split(features, ends[:-1])])
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def _class_texts(name: str, templates: Sequence[str]) -> list[str]:
    synonyms = [x.strip() for x in name.split(",") if x.strip()]
    if not synonyms or not templates:
        raise ValueError(f"class '{name}': nothing to embed, there must be a name and a template")
    return [template.format(synonym) for synonym in synonyms for template in templates]


def _class_tokens(tokenizer: Tokenizer, name: str, texts: list[str]) -> np.ndarray:
    try:
        return tokenizer(texts)
    except ValueError as error:
        raise ValueError(f"class '{name}': {error}") from error


def _encode_in_batches(
    encode_text: Callable[[np.ndarray], np.ndarray], tokens_nt: np.ndarray, batch_size: int
) -> np.ndarray:
    """Encodes rows of tokens in batches of one shape, without the common padding."""
    used = int(np.flatnonzero(tokens_nt.any(axis=0))[-1]) + 1
    tokens_nt = tokens_nt[:, : _round_up(used, LENGTH_STEP)]
    rows = min(batch_size, _round_up(len(tokens_nt), ROW_STEP))
    features = []
    for start in range(0, len(tokens_nt), rows):
        batch = tokens_nt[start : start + rows]
        filled = np.pad(batch, ((0, rows - len(batch)), (0, 0)))
        features.append(np.array(encode_text(filled), np.float32)[: len(batch)])
    return np.concatenate(features)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _clean(text: str) -> str:
    if not text.isascii() or not text.isprintable() or "&" in text:  # else ftfy changes nothing
        import ftfy

        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _byte_characters() -> str:
    """Gives the character that stands for each byte, in CLIP's order (that of GPT-2)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return "".join(chr(x) for x in (*visible, *range(BYTES, 2 * BYTES - len(visible))))


def _clip_vocab(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    characters = _byte_characters()
    tokens = [*characters, *(x + END_OF_WORD for x in characters)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START_TOKEN, END_TOKEN]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def _clip_backend(vocab: dict[str, int], merges: Sequence[tuple[str, str]]):
    """Builds the ``tokenizers.Tokenizer`` that transformers' CLIPTokenizer builds."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    model = models.BPE(
        vocab=vocab,
        merges=list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
        unk_token=END_TOKEN,
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([START_TOKEN, END_TOKEN])
    backend.post_processor = processors.RobertaProcessing(
        (END_TOKEN, vocab[END_TOKEN]), (START_TOKEN, vocab[START_TOKEN]), False, False
    )
    return backend


def _transformers_normaliser():
    """Cleans texts as transformers' CLIPTokenizer does, for those who read our files with it."""
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
