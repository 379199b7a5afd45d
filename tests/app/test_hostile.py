"""Requests written by hand: those of a page, and others, which get nobody's data and do not take the server down."""

import json
import re
import secrets
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import pytest

from helpers.app import state_of, write_small_video
from helpers.app_server import Visitor, file_data
from helpers.processes import wait_until
from samoe_hf.app.uploads import Limits

POINT = "+ is the object"
WEIRD = {
    "nothing": None,
    "huge": 10**300,
    "not a number": float("nan"),
    "text": "../" * 30_000 + "etc/passwd",
    "mapping": {"path": "/etc/passwd", "value": {}, "__type__": "update"},
    "files": [file_data("/etc/passwd")],
    "fraction": 0.5,
    "one": 1,
    "list": [[]],
}


@pytest.fixture(scope="module", autouse=True)
def no_processes():
    """Some of what is sent to all endpoints starts learning, whose process would compute beside all further tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samoe_hf.app.learning.subprocess", Mock(**{"Popen.return_value.poll.return_value": 1}))
        yield


@pytest.fixture(scope="module")
def victim(served, tmp_path_factory):
    """Somebody with a video and masks."""
    visitor = Visitor(served.url)
    assert visitor.load().success
    path = write_small_video(tmp_path_factory.mktemp("victim") / "private.mp4", seed=99)
    visitor.stored, visitor.on_server = visitor.open(path), visitor.person(served)
    return visitor


@pytest.fixture(scope="module")
def stranger(served):
    """Whose requests have nothing to do with a session."""
    visitor = Visitor(served.url)
    assert visitor.load().success
    return visitor


@pytest.fixture
def attacker(served):
    visitor = Visitor(served.url)
    assert visitor.load().success
    return visitor


def test_a_visit_that_looks_inside_compares_collects_and_takes_the_project_along(served, small_video):
    visitor = Visitor(served.url)
    visitor.load()

    def act(element, event, *values, **others) -> str:
        answer = visitor.act(element, event, *values, **others)
        assert answer.success, answer.text
        return answer.text

    act("upload", "upload", [file_data(*visitor.upload("clip.mp4", small_video.read_bytes()))])
    for chosen, place in ((None, [100, 100]), (1, [300, 200])):
        act("frame", "select", 0, chosen, "Box: two corners", event_data={"index": place, "value": None})
    assert "Tracked." in act("track", "click", 0) and "chosen by the gate" in act("look-tab", "select", None, None)
    assert not visitor.act("use", "click", "domains", "first", "best", 0).success
    used = act("use", "click", "domains", "first", "score", 0)
    assert "as you chose" in used and "**score**" in used
    last = visitor.act("track", "click", 0).output["data"]  # is sent twice, and must not bring the slider back
    assert "Tracked." in last and all(value in ("Tracked.", {"__type__": "update"}) for value in last)
    assert "score" in act("timeline", "select", event_data={"index": [700, 9], "value": None})
    looked = act("look", "click", 4)
    assert looked.count("jpeg") == 2 and "layer" in looked
    assert "object 1" in act("compare", "click", "domains: the base model", "nano", False)
    assert re.search("collected: [1-9]", act("collect", "click"))  # others of the app may have collected more
    (path,) = set(re.findall(r'"path": ?"([^"]+_project.zip)"', act("export", "click", "Project, to go on later")))
    project = visitor.client.get(f"/gradio_api/file={path}").content
    other = Visitor(served.url)
    other.load()
    assert "object 1" in other.act("upload", "upload", [file_data(*other.upload("project.zip", project))]).text
    assert visitor.act("undo", "click", 0).success is other.act("undo", "click", 0).success is False


def state(victim) -> SimpleNamespace:
    person = victim.on_server
    return SimpleNamespace(session=person.session, corner=person.corner, **vars(state_of(person.session)))


@pytest.mark.parametrize(
    "has_video, kinds",
    [(False, ["fraction"]), (True, ["nothing", "mapping"]), pytest.param(True, [*WEIRD], marks=pytest.mark.slow)],
)
def test_every_endpoint_survives_every_kind_of_value(served, victim, attacker, has_video, kinds):
    """In a session of its own, whose failures stay its own."""
    before, secret = state(victim), victim.on_server.secret
    private = [secret, str(served.people.folder), "private"]
    if has_video:
        assert attacker.act("take-example", "click", "Shapes").success
    for endpoint in attacker.endpoints:
        if any(event in ("load", "unload") for _, event in attacker.targets(endpoint)):
            continue
        inputs = len(attacker.inputs(endpoint)) - 1
        for value in [WEIRD[kind] for kind in kinds] if inputs else (None,):
            data = [secret, *[value] * inputs]
            answer = attacker.send(endpoint, data, event_data={"index": value, "value": value})
            assert not any(text in answer.text for text in private), answer.text[:500]
    assert state(victim) == before
    assert victim.act("slider", "input", 3).success


def test_endpoints_get_other_than_their_inputs(attacker, victim):
    before = state(victim)
    for endpoint in attacker.endpoints:
        for body in ([], [1] * 1000):
            attacker.send(endpoint, body)
    for body in ({}, None):  # which Gradio refuses whatever the endpoint
        assert not attacker.send(endpoint, body).success
    assert state(victim) == before and attacker.client.get("/config").status_code == 200


def test_numbers_that_fit_no_video(session):
    from samoe_hf.app.page_parts import frame_of, integer, object_of, point_of

    session.add_object()
    assert (frame_of(session, 7.0), object_of(session, 1), integer(20, "steps", 1, 20)) == (7, 1, 20)
    x, y = point_of(session, [0, 383])
    assert 0 < x < 1 and 63 < y < 64
    for value in (*WEIRD.values(), True, "1", -1, 8, 2.5, 10**400, float("inf")):
        if value not in (0, 1) or value is True:
            with pytest.raises(ValueError, match="`frame` must be an integer from 0 to 7"):
                frame_of(session, value)
        if value != 1 or value is True:
            with pytest.raises(ValueError, match=r"`object` must be one of the video's objects \(1\)"):
                object_of(session, value)
        if value != 0:
            for place in (value, [value, 5], [5, value], [5, 5, value], [5]):
                if value not in (1, 8, 2.5, 0.5) or not isinstance(place, list) or len(place) != 2:
                    with pytest.raises(ValueError, match="A click must have a position in the frame"):
                        point_of(session, place)


def test_no_statistics_of_all_events_are_computed_at_each(attacker, monkeypatch):
    monkeypatch.setattr("gradio.queueing.Queue._get_df", computed := Mock())
    for _ in range(2):
        attacker.act("undo", "click", 0)
    assert not computed.called


def test_the_state_that_a_page_sends_counts_for_nothing(attacker, victim):
    """The secret is the server's to know: whoever sends another's gets only what is his own."""
    before, click = state(victim), attacker.endpoint("frame", "select")
    for secret in (victim.on_server.secret, [victim.on_server.secret], {"value": victim.on_server.secret}):
        answer = attacker.send(click, [secret, 0, None, POINT], {"index": [50, 50], "value": None})
        assert not answer.success and "There is no video yet" in answer.text
    assert state(victim) == before


def test_without_a_secret_nothing_is_done(served, victim):
    for secret in ("x" * 43, None, {"a": 1}):
        answer = Visitor(served.url).load(secret)
        assert "jpeg" not in answer.text and victim.on_server.secret not in answer.text
    for element, value in (("take-example", "Shapes"), ("track", 0)):
        answer = Visitor(served.url).act(element, "click", value)
        assert not answer.success and "Load it anew" in answer.text


def test_files_of_the_server_and_of_others_are_not_handed_out(served, victim):
    files = [path for path in victim.on_server.folder.rglob("*") if path.is_file()][:3]
    assert files
    paths = ["/etc/passwd", "/proc/self/environ", *map(str, files), str(served.people.folder), "pyproject.toml"]
    for path in paths:
        for form in (path, f"..{path}", f"%2e%2e{path}", f"file://{path}"):
            for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/"):
                answer = victim.client.get(f"{route}{form}")
                assert answer.status_code in (307, 400, 403, 404, 405, 422), (route, form, answer.status_code)


def test_paths_that_a_page_names_are_not_read(attacker, served, victim, tmp_path):
    """Uploads are named by what the upload gave, and by nothing else."""
    own = write_small_video(tmp_path / "x.mp4")
    inside = next(path for path in served.people.folder.rglob("*.mp4"))
    names = ["/etc/passwd", str(own), str(inside), f"{victim.stored}/../../../../../{own}", "http://127.0.0.1:9/x.mp4"]
    for name in names:
        for data in (file_data(name), file_data(name, url=f"file://{own}"), file_data(name, orig_name="/tmp/x.mp4")):
            assert not attacker.act("upload", "upload", [data]).success, name
            assert "There is no video yet" in attacker.act("undo", "click", 0).text


@pytest.mark.parametrize("name", ["../../../x.mp4", "/tmp/x.mp4", "x\x00.mp4", "." * 300 + ".mp4", "💥.mp4"])
def test_names_of_uploads_lead_nowhere(stranger, served, small_video, name):
    answer = stranger.client.post("/gradio_api/upload", files={"files": (name, small_video.read_bytes())})
    if answer.status_code == 200:
        (stored,) = answer.json()
        assert served.folder in Path(stored).resolve().parents
        stranger.act("upload", "upload", [file_data(stored)])
    assert not (served.folder.parent / "x.mp4").exists()


def test_files_of_one_upload_together_may_not_be_too_large(stranger, served):
    before = list((served.folder / "gradio").rglob("*"))
    files = [("files", (f"{i}.png", bytes(3 * 2**20))) for i in range(4)]
    assert stranger.client.post("/gradio_api/upload", files=files).status_code == 413
    form = httpx.Request("POST", f"{served.url}gradio_api/upload", files=files)
    body, headers = form.read(), {"content-type": form.headers["content-type"]}
    chunks = (body[i : i + 2**20] for i in range(0, len(body), 2**20))  # whose number nobody tells
    assert stranger.client.post("/gradio_api/upload", content=chunks, headers=headers).status_code == 413
    assert list((served.folder / "gradio").rglob("*")) == before


def test_an_upload_that_is_no_file_is_refused(stranger, small_video):
    """Since it would be kept in RAM."""
    for data in ({"x": "y" * 2 * 2**20}, {str(i): "y" * 2**19 for i in range(4)}):
        files = {"files": ("x.mp4", small_video.read_bytes())}
        answer = stranger.client.post("/gradio_api/upload", files=files, data=data)
        assert answer.status_code == 400 and "Too many fields" in answer.text


@pytest.mark.parametrize("route", ["queue/join", "run/predict", "component_server", "cancel"])
def test_large_events_are_refused_before_they_are_read(stranger, route):
    headers = {"content-type": "application/json"}
    for content in (b'"' * (2**20 + 1), (b'"' * 2**17 for _ in range(20))):
        answer = stranger.client.post(f"/gradio_api/{route}", content=content, headers=headers)
        assert answer.status_code in (400, 413)


def test_an_upload_that_its_disk_has_no_room_for_is_refused(stranger, small_video, monkeypatch):
    monkeypatch.setattr("samoe_hf.app.page_requests.shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    answer = stranger.client.post("/gradio_api/upload", files={"files": ("x.mp4", small_video.read_bytes())})
    assert answer.status_code == 507 and "no room" in answer.text


def test_requests_of_strangers_throw_nobody_out(serve, small_model, small_video, monkeypatch):
    monkeypatch.setattr("samoe_hf.app.page_requests.STRANGERS", 4)
    with serve([small_model], Limits(sessions=2)) as running:
        first, second = Visitor(running.url), Visitor(running.url)
        for visitor in (first, second):
            assert visitor.load().success and visitor.open(small_video)
        slider = first.endpoint("slider", "input")
        for _ in range(6):
            assert not first.send(slider, [None, 0], session_hash=secrets.token_hex(6)).success
            assert not Visitor(running.url).load().success  # there are two already
        for visitor in (first, second):
            assert visitor.act(
                "frame", "select", 0, None, POINT, event_data={"index": [100, 100], "value": None}
            ).success


def test_no_endpoint_is_open_by_name(stranger):
    info = stranger.client.get("/gradio_api/info").json()
    assert not info["named_endpoints"] and not info["unnamed_endpoints"]
    for endpoint, route in zip(stranger.endpoints.values(), cycle(("run", "call", "api"))):
        answer = stranger.client.post(f"/gradio_api/{route}/{endpoint['api_name']}", json={"data": [""]})
        assert answer.status_code >= 400 or "jpeg" not in answer.text


@pytest.mark.slow
def test_more_than_the_queue_holds_is_refused_and_then_all_goes_on(served, attacker):
    codes = set()
    for number in range(200):
        body = {"data": [None, 0], "fn_index": attacker.endpoint("track", "click"), "session_hash": f"flood{number}"}
        codes.add(attacker.client.post("/gradio_api/queue/join", json=body).status_code)
    assert codes == {200, 503}
    wait_until(lambda: attacker.act("take-example", "click", "Shapes").success)


def test_what_is_not_json_is_refused(stranger):
    for content in (b"", b"{", b"\xff" * 100, b"[" * 50_000, json.dumps({"data": "x" * 10**6}).encode()):
        for route in ("queue/join", "run/predict", "call/predict", "reset", "cancel"):
            headers = {"content-type": "application/json"}
            assert stranger.client.post(f"/gradio_api/{route}", content=content, headers=headers).status_code >= 400
    assert stranger.client.get("/").status_code == 200
