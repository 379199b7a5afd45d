"""Secrets of pages, and when what belongs to them is freed."""

import pytest

from samoe_hf.app.people import People, freeing_unused
from samoe_hf.app.uploads import Limits


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def people(tmp_path, clock):
    return People(tmp_path / "people", Limits(sessions=3, idle_seconds=100, grace_seconds=10), clock)


def test_a_secret_leads_to_its_person_only(people):
    first, second = people.enter(None, "a"), people.enter("", "b")
    assert first is not second and len(first.secret) > 40 and first.secret != second.secret
    assert people[first.secret, "a"] is first and first.folder != second.folder


@pytest.mark.parametrize("secret", [None, "", "x" * 43, "x.y", "ä.ö", 3, [], {}, "../..", b"x", True])
def test_a_wrong_secret_gives_nobody(people, secret):
    person = people.enter(secret, "a")
    assert person.secret != secret and len(people) == 1 and not people.is_away(secret)
    with pytest.raises(ValueError, match="Load it anew"):
        people[str(secret), "a"]


def test_a_refresh_finds_what_was_there_in_time(people, clock):
    person = people.enter(None, "a")
    people.leave("a")
    clock.now = 9
    assert people.enter(person.secret, "b") is person
    people.enter(person.secret, "c")  # the next page may come before the last one has left
    people.leave("b")
    clock.now = 50
    assert people.free_unused() == 0 and people[person.secret, "c"] is person
    people.leave("c")
    clock.now = 60
    assert people.free_unused() == 1


def test_a_page_that_lost_its_connection_for_a_moment_keeps_what_it_has(people, clock):
    person = people.enter(None, "a")
    people.leave("a")
    clock.now = 9
    people[person.secret, "a"]
    clock.now = 100
    assert people.free_unused() == 0 and person.is_open


def test_of_two_tabs_of_one_person_the_later_one_works(people):
    """Such as a tab and its duplicate: a click in the first would otherwise land in a video that the second opened."""
    person = people.enter(None, "a")
    people.enter(person.secret, "b")
    with pytest.raises(ValueError, match="opened in another tab"):
        people[person.secret, "a"]
    assert people[person.secret, "b"] is person
    people.enter(person.secret, "a")
    assert people[person.secret, "a"] is person


def test_who_was_freed_comes_back_under_the_same_secret(people, clock):
    person = people.enter(None, "a")
    assert not people.is_away(person.secret)
    people.leave("a")
    assert people.is_away(person.secret)
    clock.now = 10
    people.free_unused()
    assert people.is_away(person.secret)
    again = people.enter(person.secret, "b")
    assert again is not person and again.secret == person.secret and not people.is_away(person.secret)


def test_what_a_closed_page_held_is_freed_with_its_files(people, clock, session):
    person = people.enter(None, "a")
    person.take(session)
    (person.folder / "file").write_text("x")
    people.leave("a")
    assert people.free_unused() == 0
    clock.now = 10
    assert people.free_unused() == 1 and not person.folder.exists() and person.session is None
    assert people.enter(person.secret, "b") is not person


def test_an_open_page_that_nobody_uses_is_freed_and_makes_room(people, clock):
    person = people.enter(None, "a")
    clock.now = 99
    people[person.secret, "a"]
    for page in "bc":
        people.enter(None, page)
    with pytest.raises(ValueError, match="3 people use this app now"):
        people.enter(None, "d")
    clock.now = 198
    assert people.free_unused() == 0
    clock.now = 199
    people.enter(None, "d")
    assert not person.folder.exists()


def test_of_pages_that_are_loaded_and_do_nothing_the_idlest_makes_room(people, clock, session):
    """So that a stranger who loads many keeps nobody out for long, and whoever has a video stays."""
    first, second, third = (people.enter(None, page) for page in "abc")
    first.take(session)
    clock.now = 9
    people[third.secret, "c"]
    with pytest.raises(ValueError, match="3 people use this app now"):
        people.enter(None, "d")
    clock.now = 10
    people.enter(None, "d")
    assert list(people)[:2] == [first, third] and not second.folder.exists()


def test_files_of_a_person_make_room_for_the_next(people, make_session):
    with freeing_unused(people, every_seconds=0.01):
        person, first, second = people.enter(None, "a"), make_session(), make_session()
        with pytest.raises(ValueError, match="no video"), person.opening() as folder:
            (folder / "part").write_text("x")
            raise ValueError("no video")
        assert not list(person.folder.iterdir())
        person.take(first)
        person.corner = (1, 0, 2.0, 3.0)
        person.take(second)
        assert person.session is second and person.corner is None and not first.folder.exists()
    assert not second.folder.exists()
