"""Measures how the picture's features vary among videos of a look, which the gate expects of a domain of few videos.

    python scripts/domains/write_spread.py

Ten minutes on one core. It writes `samoe_hf/surgery/video_spread.safetensors`: the covariance within each synthetic
look, the mean of those of the look as it is and changed. No video that `measure_domains.py` reads is among them.
"""

import argparse

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from read_looks import VARIANTS, read_look
from samoe_hf import SamoeModel, small_base
from samoe_hf.continual.fit_gate import MIN_FRAMES
from samoe_hf.model.domain_gate import num_pooled_features
from samoe_hf.surgery.gate import SPREAD_FILE, SPREAD_SIZE

NUM_VIDEOS, NUM_FRAMES, SEED = 20, 7, 101


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    model = SamoeModel.from_pretrained(small_base(), image_size=SPREAD_SIZE).eval()
    skipped, spreads = num_pooled_features(model.config)[0], {}
    for look, change in tqdm(VARIANTS, unit="look"):
        videos = read_look(model, look, range(NUM_VIDEOS), NUM_FRAMES, MIN_FRAMES, change, SEED)
        covariance = torch.cat(videos)[:, skipped:].double().T.cov(correction=0) * (NUM_VIDEOS + 1) / (NUM_VIDEOS - 1)
        spreads.setdefault(look, []).append(covariance)
    save_file({look: torch.stack(those).mean(0).float() for look, those in spreads.items()}, SPREAD_FILE)


if __name__ == "__main__":
    main()
