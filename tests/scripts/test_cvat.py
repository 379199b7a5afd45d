"""CVAT's functions, served as Nuclio serves them, and called as CVAT's server calls them."""

import base64
import io
import json
import logging
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

import cvat_functions
from helpers.label_tools import call, corners, iou, serving
from samoe_hf.data.shapes import draw, joined, polygons_of
from samoe_hf.data.synthetic import SyntheticVideos

FOLDER = Path(cvat_functions.__file__).parent
SIZE = 96, 128
LATE = 4  # the frame on which the second object starts


@pytest.fixture(scope="module")
def video():
    return SyntheticVideos(1, 16, SIZE, seed=4)[0]


@pytest.fixture(scope="module")
def context(small_folder):
    """What Nuclio hands to a function, after it was started."""
    context = SimpleNamespace(user_data=SimpleNamespace(), logger=logging.getLogger("nuclio"), Response=SimpleNamespace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMOE_MODEL", small_folder)
        cvat_functions.init_context(context)
    return context


def deployed(context, name):
    """Serves a function as its YAML says: a JSON body is parsed, and what the handler gives is sent."""
    _, _, handler = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["spec"]["handler"].partition(":")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            response = getattr(cvat_functions, handler)(context, SimpleNamespace(body=json.loads(body)))
            self.send_response(response.status_code)
            self.send_header("Content-Type", response.content_type)
            self.end_headers()
            self.wfile.write(response.body.encode())

        def log_message(self, *_):
            pass

    return serving(HTTPServer(("127.0.0.1", 0), Handler))


@pytest.fixture(scope="module")
def interactor(context):
    with deployed(context, "interactor") as url:
        yield url


@pytest.fixture(scope="module")
def tracker(context):
    with deployed(context, "tracker") as url:
        yield url


def ask(url, **body):
    return call(url, body)[:2]


def track(url, **body):
    status, answer = ask(url, **body)
    assert status == 200, answer
    assert set(answer) == {"shapes", "states"}
    return answer["shapes"], answer["states"]


def image_of(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def shape_of(mask, kind):
    if kind == "rectangle":
        points = corners(mask)
    elif kind == "polygon":
        points = joined(polygons_of(mask))
    else:
        x0, y0, x1, y1 = corners(mask)
        runs, last = [0], False
        for value in mask[y0:y1, x0:x1].ravel():
            if value != last:
                runs.append(0)
            runs[-1] += 1
            last = value
        points = [*runs, x0, y0, x1 - 1, y1 - 1]
    return {"type": kind, "points": points}


def mask_of(shape):
    """What a shape covers, read by other code than the functions'."""
    points = shape["points"]
    if shape["type"] == "polygon":
        return draw(points, SIZE)
    mask = np.zeros(SIZE, dtype=bool)
    if shape["type"] == "rectangle":
        x0, y0, x1, y1 = points
        mask[y0:y1, x0:x1] = True
        return mask
    *runs, x0, y0, x1, y1 = points
    pixels = [bool(i % 2) for i, run in enumerate(runs) for _ in range(run)]
    mask[y0 : y1 + 1, x0 : x1 + 1] = np.reshape(pixels, (y1 - y0 + 1, x1 - x0 + 1))
    return mask


def test_the_functions_are_described_as_cvat_reads_them():
    for name in ("interactor", "tracker"):
        function = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        about, spec = function["metadata"]["annotations"], function["spec"]
        module, _, handler = spec["handler"].partition(":")
        assert about["type"] == name and json.loads(about["spec"]) == [] and callable(getattr(cvat_functions, handler))
        assert (FOLDER / f"{module}.py").is_file()
        assert {variable["name"] for variable in spec["env"]} == {"SAMOE_MODEL"}
        assert spec["triggers"]["myHttpTrigger"]["numWorkers"] == 1  # states are kept in the process
    assert tuple(about["supported_shape_types"].split(", ")) == cvat_functions.SHAPES


@pytest.mark.parametrize("given", ["point", "box", "box and points"])
def test_what_is_clicked_becomes_a_mask(interactor, video, given):
    mask, other = video.masks(0)[:2]
    (ys, xs), (other_ys, other_xs) = np.nonzero(mask), np.nonzero(other)
    x0, y0, x1, y1 = corners(mask)
    body = {"pos_points": [], "neg_points": [], "obj_bbox": None}  # an older CVAT has null, a newer one []
    if given != "box":
        body["pos_points"] = [[float(xs[len(xs) // 2]), float(ys[len(ys) // 2])]]
    if given != "point":
        body["obj_bbox"] = [[x0, y0], [x1, y1]]
    if given == "box and points":
        body["neg_points"] = [[float(other_xs[0]), float(other_ys[0])]]
    status, answer = ask(interactor, image=image_of(video.frames[0]), **body)
    assert status == 200
    found = np.array(answer["mask"])
    assert found.shape == SIZE and set(np.unique(found)) <= {0, 255}
    assert iou(found > 0, mask) > 0.5


@pytest.mark.parametrize("kind", cvat_functions.SHAPES)
def test_shapes_are_tracked_frame_by_frame_each_from_its_own(tracker, video, kind):
    first, second = (shape_of(video.masks(t)[i], kind) for i, t in ((0, 0), (1, LATE)))
    shapes, states = track(tracker, image=image_of(video.frames[0]), shapes=[first], states=[])
    assert shapes == [first] and len(states) == 1
    overlaps = []
    for t in range(1, 9):
        # Since version 2.42 CVAT sends no shapes with states.
        shapes, states = track(tracker, image=image_of(video.frames[t]), shapes=[None] * len(states), states=states)
        assert [shape["type"] for shape in shapes] == [kind] * len(shapes)
        truth = [mask_of(shape_of(mask, kind)) for mask in video.masks(t)]
        overlaps.append([iou(mask_of(shape), true) for shape, true in zip(shapes, truth, strict=False)])
        if t == LATE:
            own = track(tracker, image=image_of(video.frames[t]), shapes=[second], states=[])[1]
            states += own
    assert np.mean([own[0] for own in overlaps]) > 0.6 and np.mean([own[1] for own in overlaps[LATE:]]) > 0.5


@pytest.mark.parametrize("kind", cvat_functions.SHAPES)
def test_masks_and_shapes_are_the_same_to_the_pixel(video, kind):
    mask = video.masks(0)[0]
    shape = shape_of(mask, kind)
    assert cvat_functions.Track(None, SIZE, mask, kind).shape() == shape
    if kind == "mask":
        assert (cvat_functions.draw_mask(shape["points"], SIZE) == mask).all()


def test_objects_that_are_tracked_together_are_tracked_as_alone(tracker, video):
    given = [shape_of(mask, "mask") for mask in video.masks(0)[:2]]

    def followed(shapes):
        states, found = track(tracker, image=image_of(video.frames[0]), shapes=shapes, states=[])[1], []
        for t in range(1, 5):
            shapes, states = track(tracker, image=image_of(video.frames[t]), states=states)
            found.append(shapes)
        return found

    alone = [followed([shape]) for shape in given]
    assert followed(given) == [[a, b] for (a,), (b,) in zip(*alone, strict=True)]


def test_states_are_bounded_and_one_that_is_gone_is_said_so(tracker, context, video, monkeypatch):
    monkeypatch.setattr(cvat_functions, "MAX_TRACKS", 2)
    image, shape = image_of(video.frames[0]), shape_of(video.masks(0)[0], "rectangle")
    used, gone = (track(tracker, image=image, shapes=[shape])[1] for _ in range(2))
    others = [track(tracker, image=image, states=used)[1], track(tracker, image=image, shapes=[shape])[1]]
    assert "not known here" in ask(tracker, image=image, states=used)[1]["message"]
    kept = context.user_data.tracker.tracks.values()
    assert len(kept) == 2
    assert all(not one.session.processed_frames and one.session.cache.get_vision_features(0) is None for one in kept)
    assert "not known here" in ask(tracker, image=image, states=gone)[1]["message"]
    assert all(ask(tracker, image=image, states=states)[0] == 200 for states in others)
    assert "most in a request" in ask(tracker, image=image, shapes=[shape] * 3)[1]["message"]


def test_an_object_that_is_not_seen_has_no_shape(tracker, video):
    states = track(tracker, image=image_of(video.frames[0]), shapes=[shape_of(video.masks(0)[0], "mask")])[1]
    blank = np.full_like(video.frames[0], 90)
    for _ in range(3):
        shapes, states = track(tracker, image=image_of(blank), states=states)
    assert shapes == [None] and len(states) == 1


BOX = {"type": "rectangle", "points": [10, 10, 40, 40]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"image": "no image"}, "in base64"),
        ({"image": base64.b64encode(b"no image").decode()}, "not a readable image"),
        ({"image": None}, "in base64"),
        ({"shapes": {}, "states": 3}, "must be lists"),
        ({"shapes": [{"type": "ellipse", "points": [1, 2, 3, 4]}]}, "must be one of rectangle, polygon, mask"),
        ({"shapes": [{"type": "rectangle", "points": [1, 2, 3]}]}, "cannot have 3 numbers"),
        ({"shapes": [{"type": "rectangle", "points": [1, 2, float("nan"), 4]}]}, "must be one of"),
        ({"shapes": [{"type": "rectangle", "points": [200, 2, 240, 4]}]}, "outside of the video"),
        ({"shapes": [{"type": "polygon", "points": [1, 2, 3, 4, 5]}]}, "cannot have 5 numbers"),
        ({"shapes": [{"type": "mask", "points": [4, 0, 0, 1]}]}, "cannot have 4 numbers"),
        ({"shapes": [{"type": "mask", "points": [0, 5, 0, 0, 1, 1]}]}, "does not fit its box"),
        ({"shapes": [{"type": "mask", "points": [0, 4, 127, 95, 128, 96]}]}, "does not fit its box"),
        ({"shapes": [{"type": "mask", "points": [4, 0, 0, 1, 1]}]}, "covers no pixel"),
        ({"shapes": [None]}, "must be one of"),
        ({"states": ["made-up"]}, "not known here"),
        ({"states": [{"py/object": "os.system"}]}, "not known here"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(tracker, video, body, message):
    status, answer = ask(tracker, **{"image": image_of(video.frames[0]), **body})
    assert status == 400 and message in answer["message"]


def test_one_bad_shape_or_state_moves_no_object(tracker, video):
    states = track(tracker, image=image_of(video.frames[0]), shapes=[BOX])[1]
    outside = {"type": "rectangle", "points": [200, 2, 240, 4]}
    wrong = [{"states": [*states, "made-up"]}, {"states": states * 2}]
    for more in (*wrong, *({"states": states, "shapes": [None, shape]} for shape in ({}, outside))):
        assert ask(tracker, image=image_of(video.frames[1]), **more)[0] == 400
    assert ask(tracker, image=image_of(video.frames[1][:64]), states=states)[0] == 400
    assert ask(tracker, image=image_of(video.frames[1]), states=states)[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Neither points nor a box"),
        ({"pos_points": [[1]]}, "`pos_points` must be a list of 2 numbers each"),
        ({"pos_points": [[300, 4]]}, "outside of the video"),
        ({"neg_points": "none"}, "`neg_points`"),
        ({"obj_bbox": [[1, 2]]}, "two corners"),
    ],
)
def test_bad_clicks_are_refused(interactor, video, body, message):
    status, answer = ask(interactor, image=image_of(video.frames[0]), **body)
    assert status == 400 and message in answer["message"]


def test_a_body_that_is_no_object_is_refused(interactor):
    assert call(interactor, [1])[0] == 400
