"""A WordPiece that is learned from titles, of any language.

    tokenizer = train_wordpiece(titles, vocab_size=30_000)
    tokenizer.save_pretrained(folder)                      # AutoTokenizer loads it

The same titles give the same bytes, in every process and on every machine.

What titles are made equal to before words are looked for (`NORMALISATION`):

- NFKC: full-width and half-width forms, ligatures and Arabic presentation forms become the usual letters;
- lower case;
- Latin and Greek letters lose their accents, as people type them: "hóng chá" and "hong cha" meet. Marks of other
  scripts stay, since they make letters there (Russian й, vowels of Hindi and Thai); but ё is written as е;
- Arabic loses the signs of vowels and the tatweel, which titles have or have not;
- a Chinese character is a word of its own, as in BERT; other scripts without spaces are cut into pieces as they come.

Every character that is common enough is in the vocabulary, alone and as the continuation of a word, so that any word of
these can be spelled; what is left is [UNK].
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["MIN_FREQUENCY", "SMALLEST_VOCABULARY", "train_wordpiece"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ASCII = (*(chr(code) for code in range(ord("0"), ord("9") + 1)), *(chr(code) for code in range(ord("a"), ord("z") + 1)))
SMALLEST_VOCABULARY = len(SPECIAL) + 2 * len(ASCII) + 23  # a hundred
MIN_FREQUENCY = 2
LONGEST_WORD = 1000  # characters; scripts without spaces have long ones
# Of the vocabulary at most this share are characters.
CHARACTERS_SHARE = 0.5
_MARK = r"\p{Mn}"
_LATIN = r"[\p{Latin}\p{Greek}]"


def _normaliser() -> normalizers.Normalizer:
    # Up to three marks on a letter (Vietnamese has two); a pattern that looks back has to know how far.
    accents = "|".join(f"(?<={_LATIN}{_MARK * before}){_MARK}" for before in (2, 1, 0))
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.NFD(),
            normalizers.Replace(Regex(accents), ""),
            normalizers.Replace(Regex("[\u064b-\u065f\u0670\u0640]"), ""),
            normalizers.NFC(),
            normalizers.Replace("\u0451", "\u0435"),
            normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
            ),
        ]
    )


def train_wordpiece(
    titles: Iterable[str], vocab_size: int = 30_000, min_frequency: int = MIN_FREQUENCY
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from titles.

    Args:
        titles: are read once; what is kept of them is how often each word comes.
        vocab_size: tokens at most, the special ones included; at least `SMALLEST_VOCABULARY`.
        min_frequency: of what becomes one token.

    Raises:
        ValueError: a smaller vocabulary.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size}: give at least {SMALLEST_VOCABULARY}")
    normaliser, splitter = _normaliser(), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for title in titles:
        words.update(word for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(title)))
    # The trainer numbers letters in the order of a hash table, and breaks ties by these numbers. Listed as special
    # tokens they have fixed ones. A word with any other character would bring that in: it is [UNK] anyway.
    characters = _characters(words, vocab_size)
    known = {character for character in characters if len(character) == 1}
    words = Counter({word: count for word, count in words.items() if known.issuperset(word)})
    fixed = [*SPECIAL, *characters]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=fixed, show_progress=False
    )
    learner.train_from_iterator(_repeated(words), trainer)
    found = learner.get_vocab()
    tokens = sorted(found, key=found.get)
    return _tokenizer(tokens, normaliser, splitter)


def _characters(words: Counter[str], vocab_size: int) -> list[str]:
    """Characters that are tokens, in a fixed order: digits and Latin letters, then the others that are common."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    room = int(vocab_size * CHARACTERS_SHARE) - 2 * len(ASCII)
    chosen = []
    for character in sorted(counts.keys() - set(ASCII), key=lambda character: (-counts[character], character)):
        room -= 1 if _stands_alone(character) else 2
        if room < 0:
            break
        chosen.append(character)
    chosen.sort()
    continued = [character for character in chosen if not _stands_alone(character)]
    return [*ASCII, *(f"##{character}" for character in ASCII), *chosen, *(f"##{character}" for character in continued)]


def _stands_alone(character: str) -> bool:
    """Whether a character is never the continuation of a word: Chinese ones, and punctuation."""
    code = ord(character)
    is_chinese = 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x20000 <= code <= 0x2CEAF
    is_chinese = is_chinese or 0xF900 <= code <= 0xFAFF or 0x2F800 <= code <= 0x2FA1F
    return is_chinese or unicodedata.category(character).startswith("P") or (code < 128 and not character.isalnum())


def _repeated(words: Counter[str]) -> Iterator[list[str]]:
    """Each word as often as it comes, in a fixed order, in lines of at most a thousand."""
    for word in sorted(words):
        count = words[word]
        while count > 0:
            yield [" ".join([word] * min(count, 1000))]
            count -= 1000


def _tokenizer(tokens: list[str], normaliser, splitter) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normaliser, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL))
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ends
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )
