"""The model card as people read it, written from results.json alone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from brainldm.base.counts import counted
from brainldm.base.covariates import VOLUMES
from brainldm.cohort.phantom_bids import MNI_NOTICE
from brainldm.model.response import own_slopes
from brainldm.recipes.card_figures import MISSED, NOT_JUDGED, UNCERTAIN

# Key of results.json, what it is, decimals.
_LINES = (
    ("ventricles", "Ventricles, asked and measured: r", 3),
    ("ventricles.slope", "Ventricles: slope", 3),
    ("brain", "Brain volume, asked and measured: r", 3),
    ("age", "Age, asked and predicted: r", 3),
    ("sex", "Sex, asked and classified: area under the curve", 3),
    ("ms_ssim", "MS-SSIM between pairs: distance from held-out phantoms' own", 4),
    ("reconstruction", "Reconstruction of held-out phantoms: PSNR, dB", 1),
    ("reconstruction.ssim", "Reconstruction of held-out phantoms: SSIM", 3),
    ("extrapolation", "Figure 4: share of noises with monotone ventricles", 2),
)

_TEMPLATE = """\
# {{ name }}

A latent diffusion model of three-dimensional T1-weighted brain images ({{ shape }} voxels of {{ voxel }} mm), told sex,
age, ventricular volume and brain volume. Its brains belong to nobody.

**It was trained on phantoms, not on people**: one template anatomy with smooth sulci, deformed, aged and painted from
random numbers. The figures below prove the machinery. They say nothing about clinical realism: folding, pathology and
scanners vary far more in people. **Not for clinical use.**

![Held-out phantoms and generated brains](mosaic.png)

The first {{ shown }} of each side, none chosen by eye (seed {{ settings.seed }}).

## What it reaches

{{ settings.brains }} brains drawn from the model's joint distribution, against {{ settings.held_out }} phantoms that
neither the model nor the predictors learnt from. Intervals are 95 %.
{%- if training.started_from %} The model began as {{ training.started_from.name }} ({{ training.started_from.id }}); \
whom that one had seen is not looked into here.{% endif %}

| | found | target | | held-out phantoms | the paper, on UK Biobank |
|---|---|---|---|---|---|
{% for line in lines -%}
| {{ line.what }} | {{ line.found }} | {{ line.target }} | {{ line.verdict|replace("missed", "**missed**") }} \
| {{ line.alone }} | {{ line.paper }} |
{% endfor %}
{{ together }}

{{ remarks }}
- MS-SSIM between generated brains: {{ synthetic }}; between held-out phantoms: {{ real }}.
- Reconstruction is against the phantom without its noise, range 1, over the whole box. Inside the head alone: PSNR
  {{ in_head }} dB. The scan that goes in: {{ scan_itself }} dB.
- Brains nearer to a training image than anybody held out, as a share: {{ copies }}.
- Brains that a gate rejects as unlike the held-out phantoms, as a share: {{ rejected }}.
  It is designed to reject {{ by_design }} of held-out phantoms. (`generate --gate` compares with the training people.)
{% for warning in warnings %}- {{ warning }}
{% endfor %}{% if picture %}
![Beyond what training covered]({{ picture }})
{% endif %}
## What it is

| | |
|---|---|
| parameters | {{ parameters }} |
| identity | {{ model.id }}, a hash of all that generates |
| weights | {{ megabytes }} MB, {{ model.weights_dtype }} (float32 in memory) |
| training | {{ trained }} |
| people | {{ training.training_images }} phantoms trained on, {{ settings.held_out }} held out (phantom seed \
{{ settings.phantom_seed }}) |
| ranges | {{ ranges }} |
{% if volumes_read %}| volumes | {{ volumes_read }} |
{% endif %}{% if calibration %}| calibration | {{ calibration }} |
{% endif %}| speed | {{ speed_told }} |

## Make it again

```sh
{{ commands }}
```

{{ by_time }}
## Use it

```sh
brainldm generate {{ called }} OUT --n 8 --age 70 --sex F --ventricles 40ml
```

## Licence

{{ licence }}. The weights are derived from phantoms made of a template, whose terms ask for this notice:

> {{ notice }}
"""


def card_text(results: Mapping[str, Any]) -> str:
    """Markdown. Every number in it comes from `results`."""
    model, training, speed = results["model"], results["training"], results["speed"]
    grid = model["grid"]
    stages = training["stages"]
    by_time = [
        f"Training `{stage}` ended by time, after {facts['steps']} of {facts['planned_steps']} planned steps: the "
        "learning rate had not come to its end."
        for stage, facts in stages.items()
        if facts.get("steps") and facts.get("planned_steps") and facts["steps"] < facts["planned_steps"]
    ]
    lines = [_line(results, *line) for line in _LINES]
    return (
        Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # Markdown
        .from_string(_TEMPLATE)
        .render(
            **{key: results[key] for key in ("model", "training", "settings", "warnings")},
            name=model["name"],
            called=model["shipped_as"] or "MODEL",
            shape=" x ".join(map(str, grid["shape_XYZ"])),
            voxel=f"{grid['voxel_mm']:g}",
            picture=results["extrapolation"]["picture"],
            shown=min(12, results["settings"]["brains"]),
            lines=lines,
            remarks="\n".join(_bullet(remark) for remark in _remarks(results)),
            together=_told_together(lines),
            synthetic=_value(results["ms_ssim"]["synthetic"], 3),
            real=_value(results["ms_ssim"]["held_out"], 3),
            in_head=_value(results["reconstruction"]["in_head"], 1),
            scan_itself=_value(results["reconstruction"]["scan_itself"], 1),
            copies=_value(results["copies"], 3),
            rejected=_value(results["gate"], 3),
            by_design=_value(results["gate"]["by_design"], 3),
            parameters=", ".join(f"{what.replace('_', ' ')} {count:,}" for what, count in model["parameters"].items()),
            megabytes=f"{model['weights_bytes'] / 1e6:.1f}",
            trained=f"recipe `{training['recipe']}`, "
            + "; ".join(f"{stage} {_stage(facts)}" for stage, facts in stages.items() if facts.get("steps")),
            ranges=_ranges(model["ranges"]),
            volumes_read=_volumes_read(training["volume_reader"]),
            calibration=_calibration(model["response"]),
            speed_told=_speed(speed),
            commands="\n".join(results["commands"]),
            by_time="".join(f"{sentence}\n" for sentence in by_time),
            licence=model["licence"] or "The model states no licence of its own",
            notice=MNI_NOTICE.replace("\n", "\n> "),
        )
    )


def _line(results: Mapping[str, Any], key: str, what: str, decimals: int) -> dict[str, str]:
    name, _, part = key.partition(".")
    whole = results[name]
    entry = whole[part] if part else whole
    return {
        "what": what,
        "found": _value(entry, decimals),
        "target": entry["target"],
        "verdict": entry["verdict"],
        "alone": _value(entry["alone"], decimals) if "alone" in entry else "",
        "paper": "" if part else _paper(whole.get("paper")),
    }


def card_lines(results: Mapping[str, Any]) -> list[str]:
    """The figures that have a target, for a terminal: the same lines as the card's table."""
    lines = [_line(results, *line) for line in _LINES]
    return [f"{line['what']}: {line['found']}, {line['target']}: {line['verdict']}" for line in lines]


def _told_together(lines: Sequence[Mapping[str, str]]) -> str:
    """Which targets are not met for certain."""
    sentences = []
    for verdict in (MISSED, UNCERTAIN, NOT_JUDGED):
        if which := [line["what"] for line in lines if line["verdict"] == verdict]:
            sentences.append(f"{verdict.capitalize()}: {'; '.join(which)}.")
    return " ".join(sentences) or "Every target is met."


def _remarks(results: Mapping[str, Any]) -> list[str]:
    """How the table is to be read."""
    settings = results["settings"]
    told = [
        '"Held-out phantoms" is the same figure of the instrument or predictor on them. Volumes are found by '
        f"{settings['instrument']}, here and when they were recorded, so that theirs tells how it repeats itself; "
        f"{settings['sampler']} took {settings['steps']} steps.",
        "Against the volumes that held-out phantoms truly have, the instrument reads "
        + "; ".join(_instrument(name, facts) for name, facts in results["instrument"].items())
        + ". What is asked of the model is what the instrument reads, not what a phantom has.",
        '"Uncertain" is met by the figure, and not by all of its interval.',
    ]
    for count, what in (
        (settings["not_made"], "could not be made"),
        (settings["not_judged"], "could not be judged, or not in every way"),
    ):
        if count:
            told.append(f"{counted(count, 'image')} {what}: the figures are of the others.")
    beyond = "; ".join(_beyond(results["extrapolation"]["noises"], name) for name in VOLUMES)
    return [*told, f"Asked beyond training, brains show on average (mL) {beyond}."]


def _bullet(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _instrument(name: str, facts: Mapping[str, Any]) -> str:
    volume = name.removesuffix("_mm3")
    if facts["value"] is None:
        return f"{volume}: {_value(facts, 3)}"
    bias_ml = facts["bias_mm3"]["value"] / 1000
    return f"{volume} with r {_value(facts, 3)}, slope {facts['slope']['value']:.2f} and a bias of {bias_ml:+.1f} mL"


def _beyond(noises: Sequence[Mapping[str, Any]], name: str) -> str:
    """What is shown on average where so much was asked."""
    told = []
    for position, asked in sorted(enumerate(noises[0][name]["asked_mm3"]), key=lambda pair: pair[1]):
        shown = [noise[name]["measured_mm3"][position] for noise in noises]
        seen = [value for value in shown if value is not None]
        told.append(f"{np.mean(seen) / 1000:.0f} for {asked / 1000:.0f}" if seen else f"nothing for {asked / 1000:.0f}")
    return f"{name.removesuffix('_mm3')} of {', '.join(told)}"


def _value(entry: Mapping[str, Any], decimals: int) -> str:
    if entry["value"] is None:
        return f"none ({entry.get('reason', 'not found')})"
    interval = entry["interval_95"]
    told = "" if interval is None else f", {interval[0]:.{decimals}f} to {interval[1]:.{decimals}f}"
    return f"{entry['value']:.{decimals}f} (n = {entry['n']}{told})"


def _paper(paper: object) -> str:
    if isinstance(paper, Mapping):
        return ", ".join(f"{value} ({how})" for how, value in paper.items())
    return "not reported" if paper is None else str(paper)


def _stage(facts: Mapping[str, Any]) -> str:
    seconds = facts.get("seconds")
    return f"{facts.get('steps')} steps" + ("" if seconds is None else f" in {seconds / 60:.0f} min")


def _ranges(ranges: Mapping[str, Any]) -> str:
    told = []
    for name, (low, high) in ranges.items():
        if name.endswith("_mm3"):
            told.append(f"{name.removesuffix('_mm3')} {low / 1000:.0f} to {high / 1000:.0f} mL")
        else:
            told.append(f"{name.removesuffix('_years')} {low:.0f} to {high:.0f} years")
    return ", ".join(told)


def _volumes_read(reader: Mapping[str, Any] | None) -> str:
    """How well the model reads the volumes that it corrects; empty where it does not."""
    if reader is None or not reader["used"]:
        return ""
    ventricles, brain = (100 * reader["explained"][name] for name in VOLUMES)
    return (
        f"read in each image and its latent corrected; in {reader['people']} phantoms trained on, each left out once, "
        f"{ventricles:.1f} % of the variance of ventricles and {brain:.1f} % of brain volume's is read"
    )


def _calibration(response: Mapping[str, Any] | None) -> str:
    """How the model was told before and is now; empty where it is told what is asked."""
    if response is None:
        return ""
    slope = own_slopes(np.array(response["slopes"]))
    return (
        f"on {response['brains']} brains of its own (seed {response['seed']}, {response['instrument']}), which showed "
        f"ventricles with a slope of {slope['ventricles_mm3']:.2f} and brain volume with {slope['brain_mm3']:.2f}; "
        "it is told accordingly"
    )


def _speed(speed: Mapping[str, Any]) -> str:
    if speed["seconds_a_brain"] is None:
        return "not timed"
    machine = speed["machine"]
    where = machine["processor"] or machine["device"]
    return (
        f"{speed['seconds_a_brain']:.2f} s a brain, {speed['batch']} at a time, {speed['precision']}, "
        f"{machine['threads']} threads of {machine['cores']} cores ({where}), mean of {speed['brains_timed']}"
    )
