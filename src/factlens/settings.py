"""The settings of a trace: the arguments of `trace`, checked once for all facts."""

from collections.abc import Sequence
from dataclasses import dataclass

from factlens import models
from factlens.corruption import WITHOUT_LEVEL, NoiseLevel, noise_level
from factlens.engines.choosing import ENGINES
from factlens.engines.problems import EFFECTS, METRICS
from factlens.errors import PlanError
from factlens.facts import Fact
from factlens.models import Model
from factlens.plans import as_tuple, check_choices
from factlens.tokens import ROLES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is traced, and how; the meaning of each is in `tracing.trace`."""

    kinds: tuple[str, ...]
    windows: tuple[int, ...]
    severed: tuple[str, ...]
    roles: tuple[str, ...]
    """Empty for every position."""
    effect: str
    noise: str
    level: NoiseLevel
    samples: int
    seed: int
    metrics: tuple[str, ...]
    """The first is what `effect` is measured in."""
    answer: str | None
    foil: str | None
    sites: tuple[str, ...]
    subject_at: int
    include_embedding: bool
    prepend_bos: bool | None
    engine: str
    budget: int | None

    @property
    def metric(self) -> str:
        """What the `effect` column is measured in."""
        return self.metrics[0]

    def about(self) -> dict:
        """What was measured, as a reader of the trace needs to know it."""
        return {
            "effect": self.effect,
            "noise": self.noise,
            "noise_level": self.level.value,
            "noise_source": self.level.source,
            "samples": self.samples,
            "seed": self.seed,
            "subject_at": self.subject_at,
            "prepend_bos": self.prepend_bos,
            "include_embedding": self.include_embedding,
            "metric": self.metric,
            "metrics": list(self.metrics),
            "answer": self.answer,
            "foil": self.foil,
        }


def settings_for(
    model: Model,
    facts: Sequence[Fact],
    *,
    kinds: str | Sequence[str],
    window: int | Sequence[int] | None,
    severed: str | Sequence[str],
    roles: str | Sequence[str] | None,
    noise_level: float | str | None,
    samples: int | None,
    metric: str | Sequence[str],
    sites: str | Sequence[str] | None,
    **same: object,
) -> Settings:
    """The arguments of `trace`, with the model's defaults put in. `same` are fields that stay as they are.

    Raises:
        PlanError: something that does not exist, named with what does.
    """
    defaults = models.trace_defaults(model)
    settings = Settings(
        kinds=as_tuple(kinds),
        windows=as_tuple(window if window is not None else defaults.window),
        severed=as_tuple(severed),
        roles=as_tuple(roles) if roles is not None else (),
        level=_level(model, str(same["noise"]), noise_level, facts),
        samples=samples if samples is not None else defaults.samples,
        metrics=as_tuple(metric),
        sites=as_tuple(sites) if sites is not None else (),
        **same,  # type: ignore[arg-type]
    )
    _check(settings)
    return settings


def _level(
    model: Model, noise: str, given: float | str | None, facts: Sequence[Fact]
) -> NoiseLevel:
    if noise.split(":")[0] in WITHOUT_LEVEL:
        return NoiseLevel(0.0, "not used: the subject's embeddings are replaced")
    return noise_level(model, given, [fact.subject for fact in facts])


def _check(settings: Settings) -> None:
    """Refuse settings that do not exist, before any model is run."""
    check_choices(settings.kinds, settings.windows, settings.severed)
    for name, given, known in (
        ("metric", settings.metrics, METRICS),
        ("engine", (settings.engine,), ENGINES),
        ("effect", (settings.effect,), EFFECTS),
        ("role", settings.roles, ROLES),
    ):
        if wrong := [each for each in given if each not in known]:
            raise PlanError(f"no {name} {wrong[0]!r}; there are {', '.join(known)}")
    if not settings.metrics:
        raise PlanError(f"no metric given; there are {', '.join(METRICS)}")
    if settings.samples < 1:
        raise PlanError(f"at least one noise sample is needed, not {settings.samples}")
    if "logit_diff" in settings.metrics and settings.foil is None:
        raise PlanError(
            "logit_diff compares the answer with another; say foil='...', or foil='auto' for what the "
            "corrupted run says instead"
        )
    if settings.sites and settings.engine == "one-pass":
        raise PlanError(f"the sites {', '.join(settings.sites)} are traced by engine='plain' only")
