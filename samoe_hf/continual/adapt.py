"""Adds a domain to a model: new experts are trained for it, the gate learns it, and all else stays as it was."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset

from samoe_hf.data.clip_datasets import MixedDataset, can_be_read, read_whole
from samoe_hf.data.schema import evenly_chosen
from samoe_hf.errors import InputError, input_errors
from samoe_hf.evaluation.report import format_table
from samoe_hf.evaluation.statistics import to_json
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.plots.domains import plot_sizes
from samoe_hf.surgery.domains import copy_domain_experts, fit_domain
from samoe_hf.training.arguments import can_be_scored
from samoe_hf.training.checkpoints import check_output_dir
from samoe_hf.training.trainer import SamoeTrainer, build_trainer
from samoe_hf.whole_files import whole_file, write_text

from .fit_gate import MAX_VIDEOS, decide_videos, gate_features, leave_out
from .held_out import KEPT_ASIDE, SHOWN_VIDEOS, TRAINED_ON, Compared, compare, comparison_table, means, percent
from .sizes import TOLERANCE, Sizes, choose_size, raise_ranks
from .start import domain_score, find_start, read_excerpts

RESULTS_FILE, PICTURE, SIZES_PICTURE = "adaptation.json", "adaptation.png", "sizes.png"
# If the gate refuses more than this, the user is told what to do.
MANY_REFUSED = 0.1

# Of a domain of the small models that come with the package: beside every linear layer but the decoder's.
SMALL_MODEL_EXPERTS = {
    "expert_modules": ["*"],
    "exclude_modules": ["mask_decoder.*"],
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
}


@dataclass
class Adaptation:
    """What adding a domain to a model did.

    Attributes:
        gate_videos: how many videos of it the gate saw.
        known_before: how many it knew it by before, of a domain that was there.
        at_start, at_end: J&F from 0 to 1 of the first frames of some training videos, with the experts that training
            started from and with those that it left; None where they started without effect.
        started_from: the domain whose experts its own started from, if any.
        before, after: J, F and J&F from 0 to 1, of all evaluation videos (`eval_J`) and by the domain that the data
            names (`eval_NAME_J`); empty where there are no evaluation videos.
        routed: by the domain that the data names: whose experts its videos got ("base" for none) -> how many.
        kept_aside: training videos that were not trained on, tracked by the base and by the domain.
        trained_on: where nothing was kept aside or is to be evaluated, some that were trained on, tracked likewise.
        left_out: what the gate took the domain's videos for while it did not know them, each left out in turn: a domain
            or "base" -> how many.
        sizes: those of the experts that were tried, if they were to be chosen.
    """

    domain: str
    gate_videos: int
    before: dict[str, float]
    after: dict[str, float] = field(default_factory=dict)
    routed: dict[str, dict[str, int]] = field(default_factory=dict)
    started_from: str | None = None
    kept_aside: list[Compared] = field(default_factory=list)
    trained_on: list[Compared] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    sizes: Sizes | None = None
    known_before: int = 0
    at_start: float | None = None
    at_end: float | None = None

    def table(self) -> str:
        """The scores of each domain before and after, and where its videos went, as text."""
        rows = []
        for key in [key for key in self.after if key.endswith("J&F")]:
            name = key.removeprefix("eval_").removesuffix("J&F").removesuffix("_")
            before, after = self.before[key], self.after[key]
            whose = ", ".join(f"{count} {domain}" for domain, count in self.routed.get(name, {}).items())
            rows.append([name or "all", percent(before), percent(after), percent(after - before, "+"), whose])
        return format_table(["", "J&F before", "after", "change", "experts of"], rows, left=(0, 4))

    @property
    def refused(self) -> float | None:
        """The share of the domain's further videos that the gate is expected not to give to it; None if nobody knows.

        Of n videos that were left out, k were refused: a share of (k + 1/2) / (n + 1), as by Jeffreys' prior. It is
        rather too much, since the gate knew one video fewer each time.
        """
        count = sum(self.left_out.values())
        return (count - self.left_out.get(self.domain, 0) + 0.5) / (count + 1) if count else None

    def describe(self) -> str:
        """What was won, and what to expect of the domain, in sentences."""
        name, lines = self.domain, []
        compared, which = (self.trained_on, TRAINED_ON) if self.trained_on else (self.kept_aside, KEPT_ASIDE)
        base, own = means(compared)
        if self.sizes is not None:
            lines += [self.sizes.describe(), ""]
        if compared:
            lines += [comparison_table(name, compared, which), ""]
            if self.trained_on:
                lines.append("No video was kept aside: what is won on videos that were not trained on is not known.")
        elif self.after:
            lines.append(self.table())
        else:
            lines.append("What is won is not known: no video has masks on several frames, so that it could be tracked.")
        if self.started_from is not None:
            lines.append(f"Its experts started from those of {self.started_from}.")
        if self.at_start is not None and self.at_end is not None and self.at_end < self.at_start - TOLERANCE:
            whose = self.started_from or f"{name} as it was"  # a domain that was there goes on
            nothing = " or from nothing (`--like none`)" if self.started_from else ""
            lines.append(
                f"Warning: training has spoiled the experts of {whose}: its videos have a J&F of "
                f"{percent(self.at_end)}, and had {percent(self.at_start)}. Train more slowly (`--learning_rate`)"
                f"{nothing}."
            )
        if own <= base:
            lines.append(
                f"Warning: {name} is no better than the base on the videos that were {which} ({percent(own)} "
                f"against {percent(base)}). Train it longer or on more videos, or leave it out."
            )
        if self.known_before:
            before = f"{self.known_before} video{'s' * (self.known_before > 1)}"
            lines.append(
                f"The gate knew {name} by {before} before. It learned it anew, from those of this "
                "run alone: if these are others, give all, or tell it of the former ones (`samoe domains confirm`)."
            )
        known = f"The gate knows {name} by {self.gate_videos} video{'s' * (self.gate_videos > 1)}"
        name_it = f"name the domain where you track (`--domain {name}`)"
        if self.refused is None:
            lines.append(f"{known}, which does not show how its videos differ: give more, or {name_it}.")
            return "\n".join(lines)
        count, own_count = sum(self.left_out.values()), self.left_out.get(name, 0)
        advice = f": give more videos, or {name_it}" if self.refused > MANY_REFUSED else ""
        kept = self.kept_aside and own == own
        score = f"a J&F of {percent(own)} where it is chosen ({percent(base)} without it), and " if kept else ""
        rivals = {domain: n for domain, n in self.left_out.items() if domain not in (name, "base")}
        taken = f" ({', '.join(f'{n} were taken for {domain}' for domain, n in rivals.items())})" if rivals else ""
        refuse = "refuse, or take for another domain," if rivals else "refuse"
        lines.append(
            f"{known}. Left out in turn, {own_count} of {count} were known by the others{taken}. Expect {score}the "
            f"gate to {refuse} {self.refused:.0%} or fewer of your own further videos{advice}."
        )
        return "\n".join(lines)


def adapt(
    model: str | os.PathLike,
    domain: str,
    run: Sequence[str],
    output: str | os.PathLike,
    like: str | None = AUTO,
    budget: int | None = None,
) -> Adaptation:
    """Adds a domain to a model and writes the new one.

    The gate learns the domain from the videos of the run's `train_data`, and then new experts are trained on them.
    Videos of `eval_data`, of any domains, are tracked before and after, each with the experts that the gate chooses.
    Where there are none, those that the run's `eval_fraction` keeps aside; these are also tracked by the base and by
    the new experts, whatever the gate chooses, and drawn in `adaptation.png`. The gate learns them at last. Where none
    is kept aside either, up to three videos that were trained on are tracked and drawn so.

    Args:
        model: what `SamoeModel.from_pretrained` takes; it is left as it is.
        domain: name of the new domain. One that the model has is trained on.
        run: the YAML of a run, and further `--key value`, as [`~samoe_hf.training.arguments.parse_run`] takes them.
        output: folder for the model, its checkpoints and `adaptation.json`, which is the returned value.
        like: a domain of the model whose experts the new ones start from; "auto" for the one whose experts track
            the training videos best, if they are clearly better than the base, see [`~start.find_start`]; None for
            experts without effect.
        budget: bytes that the domain's experts may have: they are trained at a high rank, and what does not matter is
            left out, see [`~sizes.choose_size`]. With None, their rank is the run's.

    Raises:
        InputError: if the domain cannot be added, or something of the run is wrong.
    """
    arguments = [*run, "--model_name_or_path", str(model), "--domain", domain, "--output_dir", str(output)]
    if like not in (AUTO, None):
        arguments += ["--domain_like", like]
    change = None if budget is None else partial(raise_ranks, domain=domain, budget=budget)
    trainer = build_trainer(arguments, change, spares=budget is not None)
    if budget is not None and trainer.is_fsdp_enabled:
        raise InputError("`budget` does not go with FSDP, which shards the experts; use DDP, or give a rank.")
    trainer.eval_domain = AUTO
    trainer.depends_on = {"like": like}
    with trainer.writer:
        check_output_dir(trainer.args, None)  # another process may have written there meanwhile
        if trainer.is_world_process_zero() and trainer.args.overwrite_output_dir:
            for name in (RESULTS_FILE, PICTURE, SIZES_PICTURE):
                (trainer.args.folder / name).unlink(missing_ok=True)
        return _adapt(trainer, domain, like, budget)


def _adapt(trainer: SamoeTrainer, domain: str, like: str | None, budget: int | None) -> Adaptation:
    output, resume = trainer.args.folder, trainer.args.resume_from_checkpoint
    shows_progress = not trainer.args.disable_tqdm and trainer.is_local_process_zero()
    result = Adaptation(domain, 0, before=_scores(trainer), started_from=None if like == AUTO else like)
    videos, learner = _training_videos(trainer.train_dataset), trainer.model
    spared: Any = trainer.spared
    known: Any = ConcatDataset([videos, spared]) if spared else videos
    assert learner.domain_gate is not None
    result.known_before = int(learner.domain_gate.counts[learner.config.domain_names.index(domain)])
    features, numbers = gate_features(learner, trainer.processor, domain, known, shows_progress)
    fit_domain(learner, domain, features, numbers)
    if like == AUTO:
        start = find_start(learner, trainer.processor, domain, videos, shows_progress)
        if start is not None and copy_domain_experts(learner, start, domain):
            result.started_from = start
    track = partial(domain_score, learner, trainer.processor, domain=domain)
    has_start = any(experts.lora_B.any() for _, experts in domain_modules(learner, domain))
    excerpts = read_excerpts(learner, videos) if has_start else []
    result.at_start = track(excerpts) if excerpts else None
    some = [] if trainer.eval_dataset else evenly_chosen(videos, SHOWN_VIDEOS)
    some = [video for video in some if can_be_scored(video)]
    # What is tracked after the training is read before it: an error would lose what was trained.
    for video in some:
        read_whole(video)
    if budget is not None:
        read_excerpts(learner, spared or videos)
    trainer.train(resume_from_checkpoint=resume)
    if budget is not None:
        result.sizes = choose_size(learner, trainer.processor, domain, budget, spared or videos, not spared)
    result.at_end = track(excerpts) if excerpts else None
    result.after, result.routed = _scores(trainer), _count_routed(trainer)
    picture = output / PICTURE if trainer.is_world_process_zero() else None
    if not trainer.eval_dataset:
        result.trained_on = compare(learner, trainer.processor, domain, some, picture, TRAINED_ON)
    if trainer.kept_aside:
        result.kept_aside = compare(learner, trainer.processor, domain, trainer.kept_aside, picture)
        # Now that it was measured, the gate may know them as well.
        more = gate_features(learner, trainer.processor, domain, trainer.kept_aside, show_progress_bar=False)
        features, numbers = torch.cat([features, more[0]]), torch.cat([numbers, more[1] + len(known)])
        fit_domain(learner, domain, features, numbers)
    result.gate_videos = len(numbers.unique())
    result.left_out = leave_out(learner, domain, features, numbers)
    with input_errors():
        trainer.save_model()
        if trainer.is_world_process_zero():
            if result.sizes is not None:
                with whole_file(output / SIZES_PICTURE) as path:
                    tried, title = result.sizes.tried, f"What {domain} needs"
                    plot_sizes([x.bytes for x in tried], [x.score for x in tried], result.sizes.chosen, title, path)
            write_text(output / RESULTS_FILE, to_json(asdict(result)) + "\n")
    return result


def _training_videos(clips: Any) -> Any:
    """Those that clips are drawn of; if damaged ones are skipped, without these, and as many as the gate looks at."""
    assert isinstance(clips, MixedDataset)
    parts: Any = [dataset.videos for dataset in clips.datasets.values()]
    videos: Any = ConcatDataset(parts)
    if all(dataset.on_error == "raise" for dataset in clips.datasets.values()):
        return videos
    return Subset(videos, [i for i in evenly_chosen(range(len(videos)), MAX_VIDEOS) if can_be_read(videos, i)])


def _scores(trainer: SamoeTrainer) -> dict[str, float]:
    metrics = trainer.evaluate() if trainer.eval_dataset else {}
    return {name: value for name, value in metrics.items() if name.rpartition("_")[2] in ("J", "F", "J&F")}


def _count_routed(trainer: SamoeTrainer) -> dict[str, dict[str, int]]:
    """By the domain that the data names: whose experts the evaluation videos get -> how many."""
    counts: dict[str, Counter[str]] = {}
    videos = trainer.eval_dataset or []
    assert isinstance(videos, list)
    for video, decision in zip(videos, decide_videos(trainer.model, trainer.processor, videos), strict=True):
        if decision is not None:
            counts.setdefault(video.domain, Counter())[decision.domain or "base"] += 1
    return {name: dict(count) for name, count in counts.items()}
