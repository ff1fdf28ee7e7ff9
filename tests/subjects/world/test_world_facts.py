"""The tables: sizes, sources, references between them, and the little grammar that fills sentences."""

from importlib.resources import files

import pytest

from cutaway.subjects.world.facts import (
    ANTONYMS,
    BOOKS,
    CITIES,
    COUNTRIES,
    LANDMARKS,
    STATES,
    TRANSLATIONS,
    actions,
    held_out_verbs,
    names,
    read_toml,
    single_token_words,
    words,
)
from cutaway.subjects.world.morphology import (
    counted,
    french_inside,
    french_name,
    plural,
    turkish_genitive,
    turkish_is,
    upper_first,
    with_article,
)


def test_every_data_file_names_its_source():
    found = {path.name for path in (files("cutaway.subjects.world") / "data").iterdir()} - {"sources.toml"}
    sources = read_toml("sources.toml")
    assert found == set(sources)
    assert all(len(entry["source"]) > 20 and entry["check"] for entry in sources.values())


def test_tables_are_whole():
    assert [len(t) for t in (COUNTRIES, STATES, CITIES, LANDMARKS, BOOKS)] == [63, 50, 217, 55, 64]
    assert [len(t) for t in (ANTONYMS, TRANSLATIONS, names())] == [41, 50, 203]
    for table in (COUNTRIES, STATES, CITIES, LANDMARKS, BOOKS):
        assert len({row.name for row in table}) == len(table)
        assert all(value for row in table for key, value in vars(row).items() if key != "note")
    assert {state.region for state in STATES} == {"South", "West", "Midwest", "Northeast"}
    assert len({state.abbreviation for state in STATES}) == 50
    # A city that were also a capital, or in two states, would make the two-hop question ambiguous.
    assert not {city.name for city in CITIES} & {state.capital for state in STATES}


def test_known_rows():
    table = {state.name: state for state in STATES}
    assert (table["Texas"].capital, table["Texas"].abbreviation, table["Texas"].bird) == ("Austin", "TX", "mockingbird")
    assert {city.name: city.state.name for city in CITIES}["Dallas"] == "Texas"
    country = {c.name: c for c in COUNTRIES}["Turkey"]
    assert (country.capital, country.of_fr, country.name_tr) == ("Ankara", "de la Turquie", "Türkiye")
    assert {m.name: m.city for m in LANDMARKS}["Eiffel Tower"] == "Paris"
    assert {b.name: b.author for b in BOOKS}["Middlemarch"] == "George Eliot"


def test_disambiguating_names_say_so():
    hacks = {"Athens City", "Portland Maine", "Salem Village"}
    assert {city.name for city in CITIES if city.note} == hacks
    assert all(state.note for state in STATES if state.capital in ("Augusta Maine", "Charleston West"))
    assert all(m.note for m in LANDMARKS if m.country in ("America", "Emirates"))


def test_actions_are_told_apart():
    harmful, harmless = actions(True), actions(False)
    assert not {a.text for a in harmful} & {a.text for a in harmless}
    assert {a.verb for a in harmful} & held_out_verbs() == {"sabotage", "kidnap", "deface"}
    assert {a.verb for a in harmless} & held_out_verbs() == {"polish", "comfort", "repair"}
    assert "steal an account" in {a.text for a in harmful}


def test_single_token_words_are_single_words():
    found = single_token_words()
    assert len(found) == len(set(found)) > 700
    assert not any(" " in word for word in found)
    assert {"Austin", "Paris", "TX", "Monday", "female"} <= set(found)


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("sandwich", "sandwiches"),
        ("box", "boxes"),
        ("watch", "watches"),
        ("child", "children"),
        ("boy", "boys"),
        ("library", "libraries"),
        ("brush", "brushes"),
        ("kiss", "kisses"),
    ],
)
def test_plurals(noun, many):
    assert plural(noun) == many


def test_counted_and_articles():
    assert (counted("one", "day"), counted("three", "day")) == ("one day", "three days")
    assert (with_article("apple"), with_article("orange"), with_article("cake")) == ("an apple", "an orange", "a cake")
    assert upper_first("the iPhone") == "The iPhone"
    assert upper_first("") == ""
    # The rule by first letter is right only while no word sounds otherwise.
    exceptions = ("hour", "honest", "heir", "uni", "use", "eu", "one")
    for name in ("objects", "event_nouns", "colors", "praise", "blame", "works", "agreement_nouns"):
        assert not [word for word in words(name) if word.startswith(exceptions)]


@pytest.mark.parametrize(
    ("name", "genitive", "is_"),
    [
        ("Fransa", "Fransa'nın", "Fransa'dır"),
        ("Paris", "Paris'in", "Paris'tir"),
        ("Lizbon", "Lizbon'un", "Lizbon'dur"),
        ("Türkiye", "Türkiye'nin", "Türkiye'dir"),
        ("Bükreş", "Bükreş'in", "Bükreş'tir"),
        ("Ürdün", "Ürdün'ün", "Ürdün'dür"),
        ("Irak", "Irak'ın", "Irak'tır"),
    ],
)
def test_turkish_suffixes(name, genitive, is_):
    assert turkish_genitive(name) == genitive
    assert turkish_is(name) == is_


def test_french_names():
    assert [french_name(of) for of in ("du Japon", "de la Chine", "de l'Inde", "de Cuba")] == [
        "le Japon",
        "la Chine",
        "l'Inde",
        "Cuba",
    ]
    with pytest.raises(ValueError, match="not a French name"):
        french_name("Japon")
    assert french_inside("La tour Eiffel") == "la tour Eiffel"
    assert french_inside("Lyon") == "Lyon"
    assert all(french_name(country.of_fr) for country in COUNTRIES)
