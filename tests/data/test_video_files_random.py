"""Random video files are read exactly as plain decoding shows them, or refused by name."""

from collections import Counter

import av
import numpy as np
import pytest

from helpers.random_videos import make_video, outcome


@pytest.mark.parametrize("seed, count", [(0, 12), pytest.param(1, 200, marks=pytest.mark.slow)])
def test_random_video_files_are_read_as_decoded_or_refused_by_name(tmp_path, monkeypatch, seed, count):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SVT_LOG", "0")
    outcomes, wrong, number = Counter(), [], 0
    while outcomes.total() < count:
        rng, number = np.random.default_rng([seed, number]), number + 1
        try:
            video = make_video(tmp_path, number, rng)
        except av.FFmpegError:  # FFmpeg does not write this combination
            continue
        result, why = outcome(video, rng)
        outcomes[video.traits.get("damage", "whole"), result] += 1
        if result == "wrong":
            wrong.append(f"{video.path.name} {video.traits}: {why}")
        video.path.unlink()
    for (kind, result), times in sorted(outcomes.items()):
        print(f"{kind:9s} {result:9s} {times}")
    assert not wrong, "\n".join(wrong)
    assert not outcomes["whole", "refused"]
