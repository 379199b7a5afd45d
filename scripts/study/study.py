"""A study of forgetting: a base learns domain after domain with each method, and all domains are scored after each.

Each training and each evaluation leaves one file or folder, whole or not at all. A study that was stopped goes on with
what is missing, and processes that share a folder find what the others have done. `results.json` holds all evaluations,
so that a study goes on from it alone as well.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from samoe_hf.continual.fit_gate import fit_gate
from samoe_hf.continual.sizes import choose_size, expert_costs, raise_ranks
from samoe_hf.continual.start import find_start
from samoe_hf.data.registry import read_yaml
from samoe_hf.data.schema import evenly_chosen
from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.model.expert_layer import DOMAIN_GATE
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import add_domain, copy_domain_experts, merge_domains, remove_domain
from samoe_hf.surgery.loras import export_expert
from samoe_hf.whole_files import new_folder, write_text
from study_gate import held_out_features, measure_gate, measure_time
from study_methods import BASE_PARAMETERS, LABELS, SEQUENTIAL, added_size, lora_settings, score, train
from study_plan import StudyPlan, StudyVideos, config_name
from study_report import BASE, CEILING, RESULTS_FILE, read_results, restore_units, write_report
from study_selectors import SELECTORS, selector_features
from token_routers import assemble_with_routers

Scores = dict[str, Any]
METHODS = tuple(name for name in LABELS if name not in (BASE, CEILING))


class Study:
    """A study in its folder.

    Args:
        plan: what it does.
        folder: for all that it writes; made if it is not there.
        device: that models are evaluated on; they are trained where `Trainer` puts them.
        methods: names of `LABELS`, which alone are run; all by default.
        show_progress_bar: whether to show one bar for the whole study.

    Raises:
        ValueError: if the folder holds another study, or something else.
    """

    def __init__(
        self,
        plan: StudyPlan,
        folder: str | Path,
        device: str | torch.device = "cpu",
        methods: Sequence[str] = METHODS,
        show_progress_bar: bool = True,
    ):
        self.plan, self.folder, self.device, self.methods = plan, Path(folder), device, methods
        self._check_folder()
        restore_units(self.folder)
        self.videos = StudyVideos(plan, self._new_model().config.image_size)
        per_order = len(methods) * plan.num_domains + len(self._seed_units(0, plan.orders[0]))
        total = len(plan.seeds) * len(plan.orders) * per_order
        self._progress = tqdm(total=total, unit="unit", disable=not show_progress_bar)
        self._models: dict[tuple[int, str, str | None, bool], SamoeModel] = {}  # with one domain each
        self._starts: dict[tuple[int, str, tuple[str, ...], bool], str | None] = {}
        self._features: dict[tuple[int, str, str], Tensor] = {}

    def _check_folder(self) -> None:
        path, identity = self.folder / RESULTS_FILE, json.loads(json.dumps(self.plan.identity()))
        if not path.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise InputError(f"{self.folder} is not empty, and not the folder of a study.")
            write_report(self.plan, self.folder)
        earlier = read_results(self.folder)["study"]
        earlier["model_config"] = config_name(str(earlier.get("model_config")))
        for name in identity:
            if earlier.get(name) != identity[name]:
                raise InputError(
                    f"{self.folder} holds another study: `{name}` is {earlier.get(name)!r} there, not "
                    f"{identity[name]!r}. Choose another `--output`."
                )

    def run(self) -> None:
        """Does what is missing of the study, and writes `results.json`, the report and its pictures as it goes on."""
        with self._progress:
            for order in self.plan.orders:
                for seed in self.plan.seeds:
                    self._run_order(seed, order)
        write_report(self.plan, self.folder)

    def _run_order(self, seed: int, order: Sequence[str]) -> None:
        for path, (description, compute) in self._seed_units(seed, order).items():
            self._unit(path, description, compute)
        folder = self._seed_folder(seed) / f"order_{'-'.join(order)}"
        by_method: dict[str, Callable[[int, Sequence[str]], Any]] = {
            "auto": partial(self._score_domains, sized=True),
            "domains": self._score_domains,
            "token_routers": self._score_routers,
            **{name: partial(self._score_selected, name) for name in SELECTORS},
        }
        for method in self.methods:
            if method in SEQUENTIAL:
                self._run_chain(seed, order, method, folder / method)
            else:
                for stage in range(1, len(order) + 1):
                    path = folder / method / f"stage_{stage}.json"
                    compute = partial(by_method[method], seed, order[:stage])
                    self._unit(path, f"{LABELS[method]}: stage {stage}", compute)
            write_report(self.plan, self.folder)

    def _seed_units(self, seed: int, order: Sequence[str]) -> dict[Path, tuple[str, Callable[[], Any]]]:
        """What does not depend on the order: file -> description and function."""
        folder = self._seed_folder(seed)
        units = {folder / "base.json": ("base: scores", lambda: self._score_all(self._base(seed), seed))}
        for name in order:
            path = self._own_folder(seed, name).with_suffix(".json")
            units[path] = (f"own LoRA of {name}: scores", partial(self._score_own, seed, name))
        units[folder / "gate.json"] = ("gate", partial(self._measure_gate, seed))
        units[folder / "time.json"] = ("time per frame", partial(self._measure_time, seed))
        return units

    # --- Units of work

    def _unit(self, path: Path, description: str, compute: Callable[[], Any]) -> None:
        """Writes what `compute` returns as JSON, unless it was written before."""
        self._progress.set_description(f"{path.parent.relative_to(self.folder)} {description}")
        if not path.is_file():
            write_text(path, json.dumps(compute(), indent=1))
        self._progress.update()

    def _show_step(self, step: int) -> None:
        self._progress.set_postfix_str(f"step {step}")

    def _seed_folder(self, seed: int) -> Path:
        return self.folder / f"seed_{seed}"

    def _new_model(self) -> SamoeModel:
        return SamoeModel(SamoeConfig(**read_yaml(self.plan.model_config)))

    def _own_folder(self, seed: int, experts: str) -> Path:
        return self._seed_folder(seed) / "own_lora" / experts

    def base_folder(self, seed: int) -> Path:
        """The folder of a seed's base, which is trained if it is not there."""
        folder, plan = self._seed_folder(seed) / "base", self.plan
        if not folder.is_dir():
            self._progress.set_description(f"seed {seed}: base")
            set_seed(seed)
            model = self._new_model()
            self._train(model, plan.base.name, BASE_PARAMETERS, plan.base_learning_rate, seed)
            with new_folder(folder) as temporary:
                model.save_pretrained(temporary)
        return folder

    def _base(self, seed: int) -> SamoeModel:
        return SamoeModel.from_pretrained(self.base_folder(seed)).eval()

    def _train(
        self,
        model: SamoeModel,
        name: str,
        trainable: str,
        learning_rate: float,
        seed: int,
        experts_of: str | None = None,
    ) -> None:
        train(
            model,
            self.videos.train(name),
            self.plan.domain(name),
            self.plan,
            trainable=trainable,
            learning_rate=learning_rate,
            seed=seed,
            on_step=self._show_step,
            experts_of=experts_of,
        )
        model.to(self.device)

    def experts_folder(self, seed: int, name: str, like: str | None = None, sized: bool = False) -> Path:
        """The folder of a seed's base with a domain's experts, which are a LoRA, and of these as a LoRA of PEFT.

        The experts are trained if they are not there, and the gate learns the domain.

        Args:
            like: the domain that they start from, itself trained from nothing.
            sized: whether their ranks are chosen, within the bytes of the study's rank, and said in `sizes.txt`.
        """
        label = name if like is None else f"{name}_like_{like}"
        folder = self._own_folder(seed, f"{label}_sized" if sized else label)
        if not folder.is_dir():
            self._progress.set_description(f"seed {seed}: {folder.name}")
            set_seed(seed)
            if like is None:
                model = SamoeModel.from_pretrained(self.base_folder(seed))
            else:
                model = copy.deepcopy(self._one_domain(seed, like, sized=sized))
            self._add_domain(model, seed, name, sized)
            if like is not None:
                copy_domain_experts(model, like, name)
                remove_domain(model, like)
            self._fit_gate(model, name)
            self._train(model, name, "experts", self.plan.learning_rate, seed, experts_of=name)
            sizes = None
            if sized:
                videos, budget = self.videos.train(name), self._budget(seed)
                sizes = choose_size(model, build_processor(model.config), name, budget, videos, trained_on=True)
            with new_folder(folder) as temporary:
                model.save_pretrained(temporary)
                if sizes is None:
                    export_expert(model, 0, temporary / "lora", domain=name)
                else:
                    write_text(temporary / "sizes.txt", sizes.describe() + "\n")
        return folder

    def _add_domain(self, model: SamoeModel, seed: int, name: str, sized: bool) -> None:
        """Gives a model a new domain's experts, which have no effect yet."""
        add_domain(model, name, **lora_settings(self.plan))
        if sized:
            raise_ranks(model, name, self._budget(seed))

    def _budget(self, seed: int) -> int:
        """The bytes of a domain's experts where all have the study's rank."""
        model = SamoeModel.from_pretrained(self.base_folder(seed))
        add_domain(model, "any", **lora_settings(self.plan))
        costs, fixed = expert_costs(model, "any")
        return self.plan.lora_rank * sum(costs.values()) + sum(fixed.values())

    def _fit_gate(self, model: SamoeModel, name: str) -> None:
        videos = self.videos.train(name)
        some = evenly_chosen(videos, self.plan.gate_videos)
        fit_gate(model.to(self.device), build_processor(model.config), name, some, show_progress_bar=False)

    def _run_chain(self, seed: int, order: Sequence[str], name: str, folder: Path) -> None:
        """Trains one model on all domains in turn; of its models, the last alone is kept."""
        model = None
        for stage in range(1, len(order) + 1):
            path = folder / f"stage_{stage}.json"
            if not path.is_file():
                model = self._learned(model, seed, order, name, folder, stage)
                self._unit(path, f"{name}: scores of stage {stage}", partial(self._scored, model, seed))
            else:
                self._progress.update()

    def _learned(
        self, model: SamoeModel | None, seed: int, order: Sequence[str], name: str, folder: Path, stage: int
    ) -> SamoeModel:
        """The model of a method that has learned `stage` domains.

        Args:
            model: that of the stage before, if it is at hand.
        """
        before, after = (folder / f"stage_{number}" for number in (stage - 1, stage))
        if after.is_dir():
            return SamoeModel.from_pretrained(after).eval()
        method = SEQUENTIAL[name]
        if model is None and stage > 1:
            model = self._learned(None, seed, order, name, folder, stage - 1)
        if model is None:
            model = SamoeModel.from_pretrained(self.base_folder(seed))
        self._progress.set_description(f"seed {seed}: {method.label}, {order[stage - 1]} ({stage} of {len(order)})")
        set_seed(seed + stage)
        finish = method.prepare(model, self.plan, stage - 1)
        rate = self.plan.full_learning_rate if method.trains_base else self.plan.learning_rate
        self._train(model, order[stage - 1], method.trainable, rate, seed)
        if finish is not None:
            finish()
        with new_folder(after) as temporary:
            model.save_pretrained(temporary)
        shutil.rmtree(before, ignore_errors=True)
        return model

    # --- Scores

    def _score_all(
        self, model: SamoeModel, seed: int, names: Sequence[str] | None = None, domain: str | None = AUTO
    ) -> dict[str, Scores]:
        names = [self.plan.base.name, *self.plan.orders[0]] if names is None else names
        return {name: score(model.to(self.device), self.videos.scored(name, seed), domain) for name in names}

    def _scored(
        self, model: SamoeModel, seed: int, names: Sequence[str] | None = None, domain: str | None = AUTO
    ) -> dict[str, Any]:
        """Scores of domains, all by default, and what the model is larger by than its base."""
        base = SamoeModel.from_pretrained(self.base_folder(seed)).state_dict()
        return {"scores": self._score_all(model, seed, names, domain), "added": added_size(model.state_dict(), base)}

    def domains_model(
        self,
        seed: int,
        names: Sequence[str],
        with_base: bool = True,
        likes: Mapping[str, str] | None = None,
        sized: bool = False,
    ) -> SamoeModel:
        """The base with the experts of domains, and a gate that knows them.

        Args:
            with_base: whether the gate knows the base's domain as well, which has no experts.
            likes: domain -> the one that its experts started from.
            sized: whether ranks are chosen.
        """
        names = [self.plan.base.name, *names] if with_base else names
        parts = [self._one_domain(seed, name, (likes or {}).get(name), sized) for name in names]
        model = copy.deepcopy(parts[0])
        for part in parts[1:]:
            merge_domains(model, part)
        return model.to(self.device).eval()

    def _one_domain(self, seed: int, name: str, like: str | None = None, sized: bool = False) -> SamoeModel:
        key = (seed, name, like, sized)
        if key not in self._models:
            if name == self.plan.base.name:
                model = SamoeModel.from_pretrained(self.base_folder(seed))
                add_domain(model, name, num_experts=0)
                self._fit_gate(model, name)
            else:
                model = SamoeModel.from_pretrained(self.experts_folder(seed, name, like, sized))
            self._models[key] = model.eval()
        return self._models[key]

    def _find_likes(self, seed: int, learned: Sequence[str], sized: bool) -> dict[str, str]:
        """Domain -> the one that its experts start from, of some that are learned one after the other."""
        starts = {name: self._find_start(seed, name, learned[:number], sized) for number, name in enumerate(learned)}
        return {name: start for name, start in starts.items() if start is not None}

    def _find_start(self, seed: int, name: str, learned: Sequence[str], sized: bool) -> str | None:
        key = (seed, name, tuple(learned), sized)
        if learned and key not in self._starts:
            model = self.domains_model(seed, learned, with_base=False, sized=sized)
            self._add_domain(model, seed, name, sized)
            self._starts[key] = find_start(
                model, build_processor(model.config), name, self.videos.train(name), show_progress_bar=False
            )
        return self._starts.get(key)

    def _score_own(self, seed: int, name: str) -> dict[str, Any]:
        return self._scored(self.domains_model(seed, [name], with_base=False), seed, [name], domain=name)

    def _score_domains(self, seed: int, learned: Sequence[str], sized: bool = False) -> dict[str, Any]:
        likes = self._find_likes(seed, learned, sized)
        model = self.domains_model(seed, learned, likes=likes, sized=sized)
        return {**self._scored(model, seed), "started_from": likes}

    def _score_routers(self, seed: int, learned: Sequence[str]) -> dict[str, Any]:
        plan_base = self.plan.base.name
        base = self.base_folder(seed)
        loras = {name: self.experts_folder(seed, name) / "lora" for name in learned}
        set_seed(seed)
        model = assemble_with_routers(
            base,
            {plan_base: None, **loras},
            {name: self.videos.train(name) for name in [plan_base, *learned]},
            num_frames=self.plan.router_frames,
            show_progress_bar=False,
            device=self.device,
        )
        return self._scored(model.eval(), seed)

    def _score_selected(self, selector: str, seed: int, learned: Sequence[str]) -> dict[str, Any]:
        """Scores where each video gets the experts of the domain that a selector chooses by its first frame."""
        base, kind = self._base(seed).to(self.device), SELECTORS[selector]
        for name in [self.plan.base.name, *learned]:
            if (seed, selector, name) not in self._features:
                features = selector_features(kind, base, self.videos.train(name), self.plan.gate_videos)
                self._features[seed, selector, name] = features
        set_seed(seed)
        choose, tensors = kind.fit({n: self._features[seed, selector, n] for n in [self.plan.base.name, *learned]})
        model, scores = self.domains_model(seed, learned), {}
        for name in [self.plan.base.name, *self.plan.orders[0]]:
            videos = self.videos.scored(name, seed)
            chosen = [choose(selector_features(kind, base, [video], 1)[0]) for video in videos]
            scores[name] = score(model, videos, chosen)
        own = {key: x for key, x in model.state_dict().items() if not key.startswith(f"{DOMAIN_GATE}.")}
        return {"scores": scores, "added": added_size(own | tensors, base.state_dict())}

    # --- The gate

    def _measure_gate(self, seed: int) -> dict[str, Any]:
        plan, names = self.plan, [self.plan.base.name, *self.plan.orders[0]]
        base = self._base(seed).to(self.device)
        held_out = {name: held_out_features(base, self.videos.held_out(name), plan.gate_videos) for name in names}
        scored = {name: self.videos.scored(name, seed) for name in names}
        build = partial(self.domains_model, seed)
        pairs = [
            (domain.name, domain.looks_like) for domain in plan.domains if {domain.name, domain.looks_like} <= {*names}
        ]
        wrong = {}
        for name, other in [*pairs, *((b, a) for a, b in pairs)]:
            wrong[name] = {"experts_of": other, **self._score_all(build([other]), seed, [name], other)[name]}
        return {**measure_gate(build, base, plan.base.name, held_out, scored), "wrong_experts": wrong}

    def _measure_time(self, seed: int) -> dict[str, float]:
        names = self.plan.orders[0]
        model = self.domains_model(seed, names)
        return measure_time(model, names[0], self.videos.scored(names[0], seed)[0], self.plan.timing_frames)
