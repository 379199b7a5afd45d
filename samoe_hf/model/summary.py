"""What a model is made of, in numbers: `SamoeModel.summary()`."""

from dataclasses import dataclass, field

from .base_model import SamoePreTrainedModel
from .domain_experts import module_domain, module_layer
from .expert_layer import expert_modules
from .quantization import weight_bytes


@dataclass
class ExpertSummary:
    """The experts that belong to one domain, or to none.

    Attributes:
        domain: its name; None for experts that are for all videos.
        num_experts, num_experts_per_tok, lora_rank, lora_alpha: of each layer.
        modules: names of the layers with these experts.
        parameters: of the experts and their routers.
    """

    domain: str | None
    num_experts: int
    num_experts_per_tok: int
    lora_rank: int
    lora_alpha: float
    modules: list[str] = field(default_factory=list)
    parameters: int = 0

    def __str__(self) -> str:
        whose = "" if self.domain is None else f" of {self.domain}"
        where = f" in {len(self.modules)} modules, such as {self.modules[0]}" if self.modules else ""
        each = f"{self.num_experts} per module, {self.num_experts_per_tok} of them for each token"
        return (
            f"experts{whose}: {self.parameters:,d} parameters{where}\n"
            f"  {each}; rank {self.lora_rank}, alpha {self.lora_alpha}"
        )


@dataclass
class ModelSummary:
    """Numbers of parameters, and the experts: one entry for each domain, or one in all. It prints as a table.

    `total` and `trainable` count all parameters, those of adapters of PEFT too; `bytes` are those of all weights as the
    model holds them, which may be quantized.
    """

    total: int
    trainable: int
    experts: list[ExpertSummary]
    bytes: int

    @property
    def frozen(self) -> int:
        """Parameters that are not trainable."""
        return self.total - self.trainable

    def __str__(self) -> str:
        width = len(f"{self.total:,d}")
        lines = [f"parameters  {self.total:{width},d}"]
        for name in ("trainable", "frozen"):
            count = getattr(self, name)
            lines.append(f"{name:11s} {count:{width},d} ({100 * count / self.total:.2f} %)")
        lines.append(f"weights     {self.bytes / 1e6:{width},.1f} MB")
        return "\n".join([*lines, *map(str, self.experts)])


def summarize_model(model: SamoePreTrainedModel) -> ModelSummary:
    """The summary of a SamoeModel."""
    fields = ("num_experts", "num_experts_per_tok", "lora_rank", "lora_alpha")
    experts: dict[str | None, ExpertSummary]
    if (domains := model.config.domains) is None:
        experts = {None: ExpertSummary(None, *(getattr(model.config, name) for name in fields))}
    else:
        experts = {one["name"]: ExpertSummary(one["name"], *(one[name] for name in fields)) for one in domains}
    for name, module in expert_modules(model):
        summary = experts[module_domain(name)]
        summary.modules.append(module_layer(name))
        own = [module.lora_A, module.lora_B, *module.router.parameters()]
        summary.parameters += sum(parameter.numel() for parameter in own)
    total, trainable = (model.num_parameters(only_trainable=only) for only in (False, True))
    return ModelSummary(total, trainable, list(experts.values()), weight_bytes(model))
