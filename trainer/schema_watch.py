"""The settings of what a run keeps, measures and tells while it goes on; a part of the one schema, `trainer/schema.py`."""

from __future__ import annotations

from typing import Literal

from trainer.setting import Count, Real, Section, WebAddress, host_of, setting


class OutputSettings(Section):
    """When checkpoints are written and how many stay."""

    save_steps: Count = setting(
        200,
        "Save every",
        "A checkpoint each time this many steps are done; 0 saves at the end only.",
        "Saving",
        basic=True,
        ge=0,
        le=10_000_000,
        unit="steps",
    )
    save_total_limit: Count = setting(
        3,
        "Checkpoints kept",
        "Older checkpoints are removed; the best and the newest always stay.",
        "Saving",
        ge=1,
        le=1000,
    )
    resume_interrupted: Count = setting(
        0,
        "Resume by itself",
        "After a crash or a restart of the machine go on, at most so often in a row; 0 asks you.",
        "Saving",
        ge=0,
        le=3,
        unit="times",
    )


class EvalSettings(Section):
    """Held-out loss and samples while training."""

    eval_strategy: Literal["no", "steps", "epoch"] = setting(
        "steps",
        "Held-out check",
        "When held-out loss is measured: never, every so many steps, or each epoch.",
        "Held-out",
    )
    eval_steps: Count = setting(
        100,
        "Held-out every",
        "Steps between held-out checks.",
        "Held-out",
        basic=True,
        ge=1,
        le=10_000_000,
        unit="steps",
    )
    sample_steps: Count = setting(
        0,
        "Sample every",
        "Steps between sample answers written by the model; 0 writes none.",
        "Samples",
        ge=0,
        le=10_000_000,
        unit="steps",
    )
    sample_prompts: list[str] = setting(
        [], "Sample prompts", "Your own prompts, one a line; empty: three held-out rows.", "Samples"
    )
    sample_max_tokens: Count = setting(
        96,
        "Sample length",
        "At most this many tokens for each sample.",
        "Samples",
        ge=1,
        le=8192,
        unit="tokens",
    )
    sample_max_s: Real = setting(
        20, "Sample time", "At most this long for each sample.", "Samples", gt=0, le=3600, unit="s"
    )


class AlertSettings(Section):
    """What is marked on the curve while the run goes on."""

    loss_spike: Real = setting(
        2.0,
        "Loss spike",
        "Marks a step whose loss is this many times the recent median; 0 marks none.",
        "Alerts",
        ge=0,
        le=1000,
    )
    disk_free_gb: Real = setting(
        2.0,
        "Free disk",
        "Marks the run when free disk falls below this.",
        "Alerts",
        ge=0,
        le=100_000,
        unit="GB",
    )


class NotifySettings(Section):
    """Who is told when a run ends or stands still while nobody looks."""

    webhook_url: WebAddress = setting(
        "",
        "Webhook",
        "Told when a run ends, fails or stands still: Slack, Discord, ntfy, else plain JSON. Kept secret.",
        "Notify",
        secret=True,
    )

    def __repr_args__(self) -> list[tuple[str, str]]:
        return [("webhook_url", host_of(self.webhook_url))]  # a traceback may print settings
