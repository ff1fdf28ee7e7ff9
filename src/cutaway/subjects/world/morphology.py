"""The little grammar that facts need: English articles and plurals, French prepositions, Turkish suffixes."""

from __future__ import annotations

_IRREGULAR = {"child": "children"}
_FRENCH_ARTICLES = (("du ", "le "), ("de la ", "la "), ("de l'", "l'"), ("des ", "les "), ("de ", ""))
_TURKISH_VOWELS = dict(zip("aıoueiöüAIOUEİÖÜâ", "aıoueiöüaıoueiöüa", strict=True))
_FOURFOLD = {"a": "ı", "ı": "ı", "o": "u", "u": "u", "e": "i", "i": "i", "ö": "ü", "ü": "ü"}


def with_article(noun: str) -> str:
    """``"apple"`` → ``"an apple"``. Right for every word of the world's lists (none begins like "hour" or "union")."""
    return f"an {noun}" if noun[0] in "aeiouAEIOU" else f"a {noun}"


def plural(noun: str) -> str:
    """The plural of a countable English noun of the world's lists."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def counted(number: str, noun: str) -> str:
    """``("one", "day")`` → ``"one day"``, any other number → the plural."""
    return f"{number} {noun if number == 'one' else plural(noun)}"


def upper_first(text: str) -> str:
    """The text with a capital first letter, the rest untouched."""
    return text[:1].upper() + text[1:]


def french_name(of: str) -> str:
    """``"de la France"`` → ``"la France"``: the name with its article, from the name with its preposition."""
    for preposition, article in _FRENCH_ARTICLES:
        if of.startswith(preposition):
            return article + of[len(preposition) :]
    raise ValueError(f"not a French name with its preposition: {of!r}")


def french_inside(name: str) -> str:
    """``"La tour Eiffel"`` → ``"la tour Eiffel"``: a name with article, as it stands inside a sentence."""
    return name[0].lower() + name[1:] if name.startswith(("La ", "Le ", "L'", "Les ")) else name


def _last_vowel(word: str) -> str:
    return next((_TURKISH_VOWELS[letter] for letter in reversed(word) if letter in _TURKISH_VOWELS), "e")


def turkish_genitive(name: str) -> str:
    """``"Fransa"`` → ``"Fransa'nın"``: a proper name with the genitive suffix, by vowel harmony."""
    buffer = "n" if name[-1] in _TURKISH_VOWELS else ""
    return f"{name}'{buffer}{_FOURFOLD[_last_vowel(name)]}n"


def turkish_is(name: str) -> str:
    """``"Paris"`` → ``"Paris'tir"``: a proper name with the copula, by vowel harmony and consonant assimilation."""
    consonant = "t" if name[-1] in "çfhkpsşt" else "d"
    return f"{name}'{consonant}{_FOURFOLD[_last_vowel(name)]}r"
