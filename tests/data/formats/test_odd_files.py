"""Files as label tools leave them: each is read as it is meant, or refused by name."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from helpers.formats import SIZE
from helpers.random_layouts import png_of
from samoe_hf.data import load_videos
from samoe_hf.data.formats.label_studio import decode_brush, encode_brush
from samoe_hf.errors import InputError

HEIGHT, WIDTH = SIZE
SQUARE, OTHER = [2, 2, 10, 2, 10, 8, 2, 8], [20, 10, 30, 10, 30, 14, 20, 14]  # 48 and 40 pixels
HOLE = np.zeros(SIZE, bool)
HOLE[2:12, 3:20] = True
HOLE[4:8, 6:10] = False  # 154 pixels
ROUND, CIRCLE = 190, 208  # pixels of an ellipse of radii 10 and 6 (area 188.5), of a circle of 8 (201.1)
# of `HOLE`, by label_studio_sdk's `mask2rle`
BRUSH = [
    0, 0, 20, 160, 57, 27, 255, 1, 107, 0, 200, 127, 249, 172, 3, 33, 255, 230, 176, 11, 127, 247, 192, 49, 63, 254,
    107, 0, 183, 255, 124, 3, 19, 255, 230, 176, 11, 127, 247, 192, 49, 63, 254, 107, 0, 183, 255, 124, 3, 19, 255, 230,
    176, 12, 135, 255, 154, 192, 50, 31, 254, 107, 0, 200, 127, 249, 172, 3, 33, 255, 240, 203, 240, 0,
]  # fmt: skip


def runs_of(mask):
    """Lengths of the runs of background and object in turn."""
    values = np.concatenate([[0], np.asarray(mask, int)])
    return np.diff([0, *np.flatnonzero(np.diff(values)), len(mask)]).tolist()


RLE = {"size": list(SIZE), "counts": runs_of(HOLE.T.ravel())}  # not compressed


def picture(size=SIZE, orientation=1):
    """An image whose file has an EXIF orientation, and which is of a size (height, width) when it is shown."""
    return size, orientation


def write(root, files):
    """Writes files by their names: pictures, text, or what becomes JSON; returns the folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            (height, width), orientation = content
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.new("RGB", (height, width) if orientation > 4 else (width, height)).save(path, exif=exif)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def read(root, kind):
    """Of each video and frame, how many pixels each object has; None where the frame is not annotated."""
    return {
        video.video_id: [
            dict(zip(video.object_ids, video.masks(t).sum(axis=(1, 2)).tolist(), strict=True))
            if t in video.annotated_frames else None
            for t in range(len(video))
        ]
        for video in load_videos(kind, root, **({"split": "default"} if kind == "coco" else {}))
    }  # fmt: skip


def check(root, kind, files, expected):
    write(root, files)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=f"(?s){re.escape(str(root))}.*{expected}"):
            read(root, kind)
    else:
        assert read(root, kind) == expected


def coco(annotations, images=({},), pictures=None, **more):
    """COCO's JSON of frames v/0.png…, with changes of each image, and annotations (image, track, segmentation)."""
    listed = [
        {"id": t, "file_name": f"v/{t}.png", "height": HEIGHT, "width": WIDTH} | own for t, own in enumerate(images)
    ]
    objects = [
        {"id": i, "image_id": image, "category_id": 1, "segmentation": segmentation}
        | (track if isinstance(track, dict) else {"track_id": track})
        for i, (image, track, segmentation) in enumerate(annotations)
    ]
    data = {"images": listed, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]} | more
    names = [f"v/{t}.png" for t in range(len(images))]
    return {"annotations/instances_default.json": data} | {
        f"images/{name}": picture() for name in (names if pictures is None else pictures)
    }


TWO = [{}, {}]
COCO = {
    "hole": (coco([(0, 1, RLE)]), {"v": [{1: 154}]}),
    "several polygons": (coco([(0, 1, [SQUARE, OTHER])]), {"v": [{1: 88}]}),
    "parts of one track": (coco([(0, 1, [SQUARE]), (0, 1, [OTHER])]), {"v": [{1: 88}]}),
    "id above 255": (coco([(0, 300, [SQUARE]), (1, 7, [SQUARE])], TWO), {"v": [{7: 0, 300: 48}, {7: 48, 300: 0}]}),
    "id 0": (coco([(0, 0, [SQUARE]), (0, 1, [OTHER])]), {"v": [{1: 48, 2: 40}]}),
    "empty frame": (coco([(0, 1, [SQUARE])], TWO), {"v": [{1: 48}, {1: 0}]}),
    "frame not listed": (coco([(0, 1, [SQUARE])], pictures=["v/0.png", "v/1.png"]), {"v": [{1: 48}, None]}),
    "numbers with gaps": (
        coco([(0, 1, [SQUARE]), (1, 1, [OTHER])], [{"frame_id": 9}, {"frame_id": 4, "file_name": r"v\1.png"}]),
        {"v": [{1: 40}, {1: 48}]},
    ),
    "videos by their ids": (
        coco([(0, 1, [SQUARE]), (1, 1, [OTHER])], [{"video_id": 5}, {"video_id": 6}],
             videos=[{"id": 5, "name": "a"}, {"id": 6, "name": "b"}]),
        {"a": [{1: 48}], "b": [{1: 40}]},
    ),
    "no tracks": (coco([(0, {}, [SQUARE]), (0, {}, [OTHER])], TWO), {"v/0.png": [{1: 48, 2: 40}]}),
    "tracks as attributes": (coco([(0, {"attributes": {"track_id": 3}}, [SQUARE])]), {"v": [{3: 48}]}),
    "a tracked crowd": (coco([(0, {"iscrowd": 1, "track_id": 3}, RLE), (0, {"iscrowd": 1}, RLE)]), {"v": [{3: 154}]}),
    "crowd of Datumaro": (
        coco([(0, {"iscrowd": 1, "attributes": {"track_id": 3}}, RLE), (0, {"iscrowd": 1}, RLE)]), {"v": [{3: 154}]},
    ),
    "turned": (coco([(0, 1, [SQUARE])]) | {"images/v/0.png": picture(SIZE, 6)}, {"v": [{1: 48}]}),
    "size of the file as stored": (
        coco([(0, 1, [SQUARE])], [{"height": WIDTH, "width": HEIGHT}]) | {"images/v/0.png": picture(SIZE, 6)},
        "labelled as 44 x 30 pixels, but shown as .30, 44.; it is turned",
    ),
    "frames of two sizes": (coco([(0, 1, [SQUARE])], [{}, {"height": 20}]), "frames of the sizes"),
    "some without track": (coco([(0, 1, [SQUARE]), (0, {}, [OTHER])]), "some annotations have a track_id"),
    "track of two classes": (
        coco([(0, 1, [SQUARE]), (0, {"track_id": 1, "category_id": 2}, [OTHER])],
             categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]),
        "'cat' and 'dog' have the same id, 1",
    ),
    "two images of one id": (coco([(0, 1, [SQUARE])], [{}, {"id": 0}]), "ids of images: 0 is there twice"),
    "image outside": (coco([(0, 1, [SQUARE])], [{"file_name": "../../x.png"}]), "no path within a folder"),
    "unknown image": (coco([(8, 1, [SQUARE])]), "an annotation of image 8"),
    "unknown category": (coco([(0, {"category_id": 9}, [SQUARE])]), "the category 9"),
    "box alone": (coco([(0, 1, [])]), "object 1: its shape is no mask"),
    "track that is no integer": (coco([(0, 1.5, [SQUARE])]), "not COCO.*1.5"),
}  # fmt: skip


def ytvis(segmentations, video=None, pictures=("v/0.png", "v/1.png"), **more):
    """YouTube-VIS' JSON of a video of two frames, and of annotations (about, segmentations)."""
    entry = {"id": 1, "file_names": ["v/0.png", "v/1.png"], "height": HEIGHT, "width": WIDTH} | (video or {})
    objects = [
        {"id": i, "video_id": 1, "category_id": 1, "segmentations": own} | about
        for i, (about, own) in enumerate(segmentations, 1)
    ]
    data = {"videos": [entry], "annotations": objects, "categories": [{"id": 1, "name": "cat"}]} | more
    return {"train.json": data} | {f"JPEGImages/{name}": picture() for name in pictures}


POLYGON = [SQUARE]
YTVIS = {
    "hole": (ytvis([({}, [RLE, None])]), {"v": [{1: 154}, {1: 0}]}),
    "several polygons": (ytvis([({}, [[SQUARE, OTHER], None])]), {"v": [{1: 88}, {1: 0}]}),
    "empty frames": (ytvis([({}, [None, None])]), {"v": [{1: 0}, {1: 0}]}),
    "id above 255": (ytvis([({"id": 300}, [None, POLYGON])]), {"v": [{300: 0}, {300: 48}]}),
    "track_id 0": (ytvis([({"track_id": 0}, [None, POLYGON])]), {"v": [{1: 0}, {1: 48}]}),
    "frame not listed": (ytvis([({}, [POLYGON])], {"file_names": ["v\\0.png"]}), {"v": [{1: 48}, None]}),
    "named videos": (ytvis([({}, [POLYGON, None])], {"name": "a"}), {"a": [{1: 48}, {1: 0}]}),
    "a crowd": (ytvis([({}, [POLYGON, None]), ({"iscrowd": 1}, [RLE, RLE])]), {"v": [{1: 48}, {1: 0}]}),
    "other size": (ytvis([({}, [POLYGON, None])], {"height": 20}), "labelled as 20 x 44 pixels"),
    "image outside": (ytvis([({}, [POLYGON] * 2)], {"file_names": ["v/0.png", "../../x"]}), "no path within a folder"),
    "too few segmentations": (ytvis([({}, [POLYGON])]), "1 segmentations for 2 frames"),
    "an id twice": (ytvis([({}, [POLYGON] * 2), ({"id": 1}, [POLYGON] * 2)]), "ids of objects in v: 1 is there twice"),
    "box alone": (ytvis([({}, [[], None])]), "object 1: its shape is no mask"),
    "without annotations": (ytvis([], annotations=None), "one file of YouTube-VIS is expected, found none"),
    "image missing": (ytvis([({}, [POLYGON, None])], pictures=["v/0.png"]), "there is no file .*1.png"),
    "two files": (
        ytvis([({}, [POLYGON, None])]) | {"val.json": ytvis([({}, [POLYGON, None])])["train.json"]},
        "train.json, val.json",
    ),
}  # fmt: skip


def yolo(lines, more=None, **data):
    """YOLO's folders of frames v/0.png…, and of lines of text for each, None for no file."""
    content = {"train": "images", "names": ["cat", "dog"]} | data
    files = {"data.yaml": json.dumps(content)} | {f"images/v/{t}.png": picture() for t in range(len(lines))}
    return files | {f"labels/v/{t}.txt": text for t, text in enumerate(lines) if text is not None} | (more or {})


def share(points):
    return " ".join(f"{value:.6f}" for value in (np.reshape(points, (-1, 2)) / (WIDTH, HEIGHT)).ravel())


LINE = f"0 {share(SQUARE)}"
YOLO = {
    "id behind": (yolo([f"{LINE} 300", f"1 {share(OTHER)} 7"]), {"v": [{7: 0, 300: 48}, {7: 40, 300: 0}]}),
    "ids beside": (yolo([f"{LINE}\n"], {"tracks/v/0.txt": "300\n"}), {"v": [{300: 48}]}),
    "several polygons": (yolo([f"{LINE} 3\n0 {share(OTHER)} 3"]), {"v": [{3: 88}]}),
    "empty file": (yolo([f"{LINE} 3", ""]), {"v": [{3: 48}, {3: 0}]}),
    "no file": (yolo([f"{LINE} 3", None, f"{LINE} 3"]), {"v": [{3: 48}, None, {3: 48}]}),
    "no ids": (yolo([LINE, f"{LINE}\n1 {share(OTHER)}", ""]), {"v/0": [{1: 48}], "v/1": [{1: 48, 2: 40}]}),
    "turned": (yolo([f"{LINE} 3"]) | {"images/v/0.png": picture(SIZE, 6)}, {"v": [{3: 48}]}),
    "other sizes": (yolo([LINE, LINE]) | {"images/v/1.png": picture((60, 44))}, {"v/0": [{1: 48}], "v/1": [{1: 96}]}),
    "path of another machine": (yolo([f"{LINE} 3"], path="/not/there"), {"v": [{3: 48}]}),
    "names by number": (yolo([f"{LINE} 3"], names={"0": "cat"}), {"v": [{3: 48}]}),
    "list of CVAT": (yolo([f"{LINE} 3"], {"l.txt": "data\\images/v/0.png\n"}, train=".\\l.txt"), {"v": [{3: 48}]}),
    "box": (yolo(["0 0.5 0.5 0.1 0.1"]), "line 1 is a box"),
    "box with an id": (yolo(["0 0.5 0.5 0.1 0.1 3"]), "line 1 is a box"),
    "confidence": (yolo([f"{LINE} 0.87"]), "not YOLO's labels.*0.87"),
    "pixels": (yolo(["0 2 2 10 2 10 8"]), "line 1 is no polygon within the image"),
    "unknown class": (yolo([f"5 {share(SQUARE)}"]), "line 1 is no polygon .*classes"),
    "two classes of one id": (yolo([f"{LINE} 3\n1 {share(OTHER)} 3"]), "'cat' and 'dog' have the same id, 3"),
    "fewer ids": (yolo([f"{LINE}\n{LINE}"], {"tracks/v/0.txt": "3"}), "2 polygons, but 1 ids"),
    "no labels": (yolo([None, None]), "no labelled frames"),
    "no such split": (yolo([LINE], train=None, val="images"), "no split 'train'; there are: val"),
}  # fmt: skip


def cvat(body, count=3, meta="", names="{}.png", more=None):
    """CVAT's XML of a task with frames."""
    task = f"<task><name>t</name>{meta}</task>" if "<project>" not in meta else meta
    xml = f"<annotations><version>1.1</version><meta>{task}</meta>{body}</annotations>"
    return {"v/annotations.xml": xml} | {f"v/images/{names.format(t)}": picture() for t in range(count)} | (more or {})


def track(i, *shapes, label="cat", group=""):
    return f'<track id="{i}" label="{label}" {group and f"group_id={group!r}"}>{"".join(shapes)}</track>'


def polygon(frame, points=SQUARE, outside=0, about="", tag="polygon"):
    pairs = ";".join(f"{x},{y}" for x, y in np.reshape(points, (-1, 2)))
    return f'<{tag} frame="{frame}" outside="{outside}" points="{pairs}" {about}/>'


def mask(frame, runs, box=(3, 2, 17, 10)):
    place = " ".join(f'{n}="{v}"' for n, v in zip(("left", "top", "width", "height"), box, strict=True))
    return f'<mask frame="{frame}" outside="0" rle="{", ".join(map(str, runs))}" {place}/>'


PATCH = runs_of(HOLE[2:12, 3:20].ravel())  # begins with the object
ALL = [polygon(t) for t in range(3)]
BOX = '<box frame="{}" outside="0" xtl="2" ytl="2" xbr="10" ybr="8"/>'
IMAGE = '<image id="0" name="0.png" width="44" height="30">{}</image>'
CVAT = {
    "hole": (cvat(track(1, mask(0, PATCH), polygon(1, outside=1))), {"v": [{1: 154}, {1: 0}, {1: 0}]}),
    "whole track": (cvat(track(300, *ALL)), {"v": [{300: 48}] * 3}),
    "id 0": (cvat(track(0, *ALL) + track(1, *ALL)), {"v": [{1: 48, 2: 48}] * 3}),
    "out and back": (cvat(track(1, polygon(0), polygon(1, outside=1), polygon(2))), {"v": [{1: 48}, {1: 0}, {1: 48}]}),
    "later start": (cvat(track(1, polygon(2))), {"v": [{1: 0}, {1: 0}, {1: 48}]}),
    "keyframes alone": (cvat(track(1, polygon(0), polygon(2))), {"v": [{1: 48}, None, {1: 48}]}),
    "no end": (cvat(track(1, polygon(0))), {"v": [{1: 48}, None, None]}),
    "group": (cvat(track(1, *ALL, group="5") + track(2, polygon(0, OTHER), polygon(1, outside=1), group="5")),
              {"v": [{1: 88}, {1: 48}, {1: 48}]}),
    "box": (cvat(track(1, *(BOX.format(t) for t in range(3)))), {"v": [{1: 48}] * 3}),
    "ellipse": (
        cvat(track(1, '<ellipse frame="0" outside="0" cx="20" cy="15" rx="10" ry="6"/>'), 1), {"v": [{1: ROUND}]},
    ),
    "numbers with gaps": (
        cvat(track(1, polygon(10), polygon(15), polygon(20)),
             meta="<start_frame>10</start_frame><frame_filter>step=5</frame_filter>"), {"v": [{1: 48}] * 3},
    ),
    "numbers in names": (
        cvat(track(1, polygon(7)), 0, more={"v/images/frame_000003.png": picture(), "v/images/frame_000007.png":
            picture()}),
        {"v": [{1: 0}, {1: 48}]},
    ),
    "for images": (
        cvat(IMAGE.format(polygon(0) + polygon(0, OTHER, about='group_id="2"') + polygon(0, about='group_id="2"'))),
        {"v/0": [{1: 48, 2: 88}]},
    ),
    "images of a video": (cvat(IMAGE.replace("0.png", "0").format(polygon(0)), 1, names="{}.PNG"), {"v/0": [{1: 48}]}),
    "turned": (
        cvat(track(1, *ALL), more={f"v/images/{t}.png": picture(SIZE, 8) for t in range(3)}), {"v": [{1: 48}] * 3},
    ),
    "other size": (
        cvat(track(1, *ALL), meta="<original_size><width>30</width><height>44</height></original_size>"),
        "labelled as 44 x 30 pixels",
    ),
    "turned box": (
        cvat(track(1, '<box frame="0" outside="0" xtl="0" ytl="0" xbr="20" ybr="2" rotation="90"/>'), 1),
        {"v": [{1: 22}]},  # of 2 x 20, 9 rows are above the image
    ),
    "mask larger than its image": (
        cvat(track(1, mask(0, [0, 10**12], (0, 0, 10**6, 10**6)))), "a mask of 1000000 x 1000000 pixels on an image",
    ),
    "mask partly outside": (cvat(track(1, mask(0, [0, 100], (40, 25, 10, 10))), 1), {"v": [{1: 20}]}),
    "image outside": (cvat(IMAGE.replace("0.png", "../../x.png").format(polygon(0))), "no path within a folder"),
    "both kinds of files": (
        cvat(track(1, *ALL)) | {f"w/{n}": text for n, text in cvat(IMAGE.format(polygon(0))).items()},
        "files for video and for images",
    ),
    "line": (cvat(track(1, polygon(0, tag="polyline"))), "a shape is a polyline"),
    "runs that do not fit": (cvat(track(1, mask(0, [5, 5]))), "runs do not add up to 17 x 10"),
    "two shapes on a frame": (cvat(track(1, polygon(0), polygon(0))), "track 1 has two shapes on frame 0"),
    "frame without image": (cvat(track(1, polygon(9))), "track 1 has a shape on frame 9"),
    "two tracks of one id": (cvat(track(1, *ALL) + track(1, *ALL)), "ids of tracks: '1' is there twice"),
    "project": (cvat(track(1, *ALL), meta="<project><id>1</id></project>"), "an export of a whole project"),
    "no frames": (cvat(track(1, *ALL), 0), "no frames beside it"),
    "cut off": ({"v/a.xml": "<annotations><version>1.1</version><meta><task>"}, "not an XML of CVAT"),
}  # fmt: skip


def labelme(*frames, pictures=None):
    """LabelMe's JSON files of frames 0.png…, each a list of shapes or a dict that changes the file, None for none."""
    names = range(len(frames)) if pictures is None else pictures
    files = {f"v/{t}.png": picture() for t in names}
    for t, own in enumerate(frames):
        about = own if isinstance(own, dict) else {"shapes": own}
        data = {"shapes": [], "imagePath": f"{t}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH, "imageData": None}
        files |= {} if own is None else {f"v/{t}.json": data | about}
    return files


def shape(points, label="cat", group=None, kind="polygon", **more):
    pairs = np.reshape(points, (-1, 2)).tolist()
    return {"label": label, "group_id": group, "shape_type": kind, "points": pairs, **more}


def embedded():
    """An image as `imageData` has it."""
    return png_of(np.zeros(SIZE, bool))


PATCH_PNG = shape([3, 2, 19, 11], group=1, kind="mask", mask=png_of(HOLE[2:12, 3:20]))
LABELME = {
    "hole": (labelme([PATCH_PNG]), {"v": [{1: 154}]}),
    "several polygons": (labelme([shape(SQUARE, group=1), shape(OTHER, group=1)]), {"v": [{1: 88}]}),
    "id above 255": (
        labelme([shape(SQUARE, group=300)], [shape(OTHER, group=7)]), {"v": [{7: 0, 300: 48}, {7: 40, 300: 0}]},
    ),
    "group 0": (labelme([shape(SQUARE, group=0)]), {"v": [{1: 48}]}),
    "one group, two labels": (labelme([shape(SQUARE, group=1), shape(OTHER, "dog", 1)]), {"v": [{1: 48, 2: 40}]}),
    "label names": (labelme([shape(SQUARE, "cat 2")], [shape(OTHER, "cat 5")]), {"v": [{2: 48, 5: 0}, {2: 0, 5: 40}]}),
    "nothing tells": (labelme([shape(SQUARE), shape(OTHER)], []), {"v/0": [{1: 48, 2: 40}]}),
    "empty frame and none": (labelme([shape(SQUARE, group=1)], [], None), {"v": [{1: 48}, {1: 0}, None]}),
    "no size": (labelme({"shapes": [shape(SQUARE, group=1)], "imageHeight": None}), {"v": [{1: 48}]}),
    "path of Windows": (labelme({"shapes": [shape(SQUARE, group=1)], "imagePath": "..\\x\\0.png"}), {"v": [{1: 48}]}),
    "embedded": (labelme({"shapes": [shape(SQUARE, group=1)], "imageData": embedded()}, pictures=[]), {"v": [{1: 48}]}),
    "turned": (labelme([shape(SQUARE, group=1)]) | {"v/0.png": picture(SIZE, 6)}, {"v": [{1: 48}]}),
    "rectangle": (labelme([shape([10, 8, 2, 2], group=1, kind="rectangle")]), {"v": [{1: 48}]}),
    "turned rectangle": (labelme([shape(SQUARE, group=1, kind="oriented_rectangle")]), {"v": [{1: 48}]}),
    "boxes of X-AnyLabeling": (
        labelme([shape(SQUARE, group=1, kind="rotation")], [shape(OTHER, group=1, kind="rectangle")]),
        {"v": [{1: 48}, {1: 40}]},
    ),
    "circle": (labelme([shape([20, 15, 20, 7], group=1, kind="circle")]), {"v": [{1: CIRCLE}]}),
    "other size": (labelme({"shapes": [shape(SQUARE, group=1)], "imageWidth": 9}), "labelled as 30 x 9 pixels"),
    "line": (labelme([shape([2, 2, 9, 9], kind="line")]), "is a line of 2 points"),
    "two points": (labelme([shape([2, 2, 9, 9])]), "a polygon 'cat' has 2 points"),
    "mask that is none": (labelme([PATCH_PNG | {"mask": base64.b64encode(b"x").decode()}]), "a mask's PNG in base64"),
    "image missing": (labelme([shape(SQUARE, group=1)], pictures=[]), "there is no file .*0.png"),
    "no name of an image": (labelme({"shapes": [shape(SQUARE, group=1)], "imagePath": ""}), "there is no file"),
    "group that is no number": (labelme([shape(SQUARE, group="a")]), "not LabelMe's JSON"),
}  # fmt: skip


def studio(*results, tasks=None, pictures=(0,)):
    """Label Studio's JSON of a task for each frame, by its results."""
    made = [
        {"id": t, "data": {"image": f"/data/upload/1/0000000{t}-{t}.png"}, "annotations": [{"result": list(own)}]}
        for t, own in enumerate(results)
    ]
    return {"tasks.json": tasks or made} | {f"images/0000000{t}-{t}.png": picture() for t in pictures}


def region(value, name="r1", kind="brushlabels", **more):
    about = {"from_name": "tag", "original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {"id": name, "type": kind, "value": value, **about, **more}


def brush(label="cat", **more):
    return region({"format": "rle", "rle": BRUSH, "brushlabels": [label]}, **more)


def percent(points, label="cat"):
    pairs = (np.reshape(points, (-1, 2)) / (WIDTH, HEIGHT) * 100).tolist()
    return region({"points": pairs, "polygonlabels": [label]}, kind="polygonlabels")


RECTANGLE = {
    "x": 200 / WIDTH, "y": 200 / HEIGHT, "width": 800 / WIDTH, "height": 600 / HEIGHT, "rectanglelabels": ["c"],
}  # fmt: skip
ELLIPSE = {
    "x": 2000 / WIDTH, "y": 1500 / HEIGHT, "radiusX": 1000 / WIDTH, "radiusY": 600 / HEIGHT, "ellipselabels": ["c"],
}  # fmt: skip
TASK = {"id": 1, "data": {"note": "as in 1.2", "image": "s3://bucket/00000000-0.png"}}
STUDIO = {
    "hole": (studio([brush()]), {"": [{1: 154}]}),
    "several regions": (studio([brush("cat 3"), percent(OTHER, "cat 4") | {"id": "r2"}]), {"": [{3: 154, 4: 40}]}),
    "one label twice": (studio([brush(), percent(OTHER) | {"id": "r2"}]), {"00000000-0": [{1: 154, 2: 40}]}),
    "ids of ours": (studio([brush(name="object-300")], [brush(name="object-7")], pictures=(0, 1)),
                    {"": [{7: 0, 300: 154}, {7: 154, 300: 0}]}),
    "label as a result of its own": (
        studio([region({"format": "rle", "rle": BRUSH}, kind="brush"), region({"labels": ["cat"]}, kind="labels")]),
        {"": [{1: 154}]},
    ),
    "choices beside": (
        studio([brush(), {"type": "choices", "from_name": "c", "value": {"choices": ["x"]}}]), {"": [{1: 154}]},
    ),
    "empty frame": (studio([brush()], [], pictures=(0, 1)), {"": [{1: 154}, {1: 0}]}),
    "not annotated": (
        studio(tasks=[{**TASK, "annotations": [{"result": [brush()]}]}, {"id": 2, "data": {"image": "1.png"},
            "annotations": []}])
        | {"images/1.png": picture()},
        {"": [{1: 154}, None]},
    ),
    "cancelled": (
        studio(tasks=[{**TASK, "annotations": [{"result": [brush()]}, {"result": [], "was_cancelled": True}]}]),
        {"": [{1: 154}]},
    ),
    "file by its path": (
        studio(tasks=[{"id": 1, "data": {"image": "/data/local-files/?d=a%5C0.png"}, "annotations": [{"result":
            [brush()]}]}])
        | {"a/0.png": picture(), "b/0.png": picture()},
        {"a": [{1: 154}]},
    ),
    "file by a name of two": (
        studio(tasks=[{"id": 1, "data": {"image": "0.png"}, "annotations": [{"result": [brush()]}]}])
        | {"a/0.png": picture(), "b/0.png": picture()},
        "'0.png' may be",
    ),
    "images as before their upload": (studio([brush()], pictures=()) | {"v/0.png": picture()}, {"v": [{1: 154}]}),
    "rectangle": (studio([region(RECTANGLE, kind="rectanglelabels")]), {"": [{1: 48}]}),
    "turned box": (studio([region(RECTANGLE | {"rotation": 30}, kind="rectanglelabels")]), "type rectanglelabels"),
    "ellipse": (studio([region(ELLIPSE, kind="ellipselabels")]), {"": [{1: ROUND}]}),
    "image missing": (studio([brush()], pictures=()), "there is no image '00000000-0.png'"),
    "video": (
        studio(tasks=[{"id": 1, "data": {"video": "/a/b.mp4"}, "annotations": [{"result": [brush()]}]}]),
        "no image; videos have boxes",
    ),
    "other size": (studio([brush(original_height=20)]), "labelled as 20 x 44 pixels"),
    "turned in the tool": (studio([brush(image_rotation=90)]), "turned by 90 degrees"),
    "keypoint": (studio([region({"x": 1, "y": 1, "width": 1}, kind="keypointlabels")]), "of the type keypointlabels"),
    "runs beyond the image": (
        studio([region({"rle": BRUSH[:4] + encode_brush(np.ones((HEIGHT + 1, WIDTH), bool))[4:]})]),
        "runs do not fit its image",
    ),
    "cut off": (studio([region({"rle": BRUSH[:40], "brushlabels": ["cat"]})]), "ends before its last value|do not fit"),
}  # fmt: skip

FORMATS = {"coco": COCO, "ytvis": YTVIS, "yolo": YOLO, "cvat": CVAT, "labelme": LABELME, "labelstudio": STUDIO}


@pytest.mark.parametrize("kind, case", [(kind, case) for kind, cases in FORMATS.items() for case in cases])
def test_odd_files_are_read_as_they_are_meant_or_refused_by_name(kind, case, tmp_path):
    files, expected = FORMATS[kind][case]
    if isinstance(expected, dict) and "" in expected:
        expected = {tmp_path.name: expected[""]}
    check(tmp_path, kind, files, expected)


def test_brushes_are_those_of_label_studio():
    assert np.array_equal(decode_brush(bytes(BRUSH), HOLE.size * 4).reshape(*SIZE, 4)[..., 3] > 0, HOLE)
    again = bytes(encode_brush(HOLE))
    assert np.array_equal(decode_brush(again, HOLE.size * 4), decode_brush(bytes(BRUSH), HOLE.size * 4))
