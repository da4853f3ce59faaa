"""index.html: one file that needs no network, no server and no script, and that still works when it is moved.

Pictures and drawings are embedded, the security policy admits nothing from outside, and all text of others goes
through jinja2's escaping.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import brainldm
from brainldm.base.files import write_text
from brainldm.report import words
from brainldm.report.drawings import draw_curves, draw_scatter, scatter_panel
from brainldm.report.results import Brain, Results, find_sweep, read_results

MAX_TABLE_ROWS = 1000
MAX_MOSAIC_SYNTHETIC, MAX_MOSAIC_REAL = 12, 12
MAX_FACTS = 80


def write_report(folder: str | Path) -> Path:
    """Writes FOLDER/index.html from the results in the folder (an evaluation, or a synthetic dataset) and returns its
    path. BadInput when the folder holds neither."""
    folder = Path(folder)
    results = read_results(folder)
    page = folder / "index.html"
    write_text(page, render(results))
    return page


def render(results: Results) -> str:
    """The page as text; a function of the results alone."""
    style, script = _asset("style.css"), _asset("page.js")
    environment = Environment(
        loader=PackageLoader("brainldm.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["covariate"] = words.covariate
    environment.filters["estimate"] = words.estimate
    panels = [
        panel
        for name in ("ventricles_mm3", "brain_mm3", "age_years")
        if (
            panel := scatter_panel(
                results.brains, results.real_points.get(name, ()), name, words.COVARIATES_SHOWN[name], results.people
            )
        )
    ]
    measured = [name for name in words.COVARIATES_SHOWN if any(name in brain.measured for brain in results.brains)]
    return environment.get_template("report.html.jinja").render(
        results=results,
        card=results.scorecard,
        title=_title(results),
        summary=_summary(results),
        tiles=list(_tiles(results)),
        sections=list(_sections(results)),
        mosaic=_mosaic(results.brains),
        real_mosaic=results.real_pictures[:MAX_MOSAIC_REAL],
        sweep=find_sweep(results.brains),
        scatter=[draw_scatter(panel) for panel in panels],
        crosses=_crosses(results) if any(panel.real for panel in panels) else "",
        curves=draw_curves(results.curves),
        measured_names=measured,
        shown=words.COVARIATES_SHOWN,
        table=results.brains[:MAX_TABLE_ROWS],
        facts=list(_facts(results)),
        version=brainldm.__version__,
        # Only this style and this script may act on the page: their hashes stand in its policy.
        style=Markup(style),  # our own file
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def _asset(name: str) -> str:
    return resources.files("brainldm.report").joinpath("templates", name).read_text(encoding="utf-8").strip()


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


# --------------------------------------------------------------------------------------------------------- the words


def _generation(results: Results) -> Mapping[str, Any]:
    facts = results.provenance.get("generation.json", {})
    return facts if isinstance(facts, dict) else {}


def _title(results: Results) -> str:
    if not results.scorecard:
        return f"{len(results.brains)} synthetic brains"
    brains = "synthetic brains" if _is_synthetic(results) else "brain images"
    return f"{results.scorecard['synthetic']['judged']} {brains}, judged"


def _is_synthetic(results: Results) -> bool:
    """Whether the folder that was judged says itself that its images were made: any images can be judged."""
    return not results.scorecard or results.scorecard["synthetic"]["kind"] == "synthetic"


def _summary(results: Results) -> str:
    """What this page is about, in a paragraph."""
    generation, card = _generation(results), results.scorecard
    model = generation.get("model", {})
    n = len(results.brains)
    synthetic = _is_synthetic(results)
    made = f"{n} {'synthetic ' if synthetic else ''}T1-weighted brain image{'s' * (n != 1)}"
    if model.get("name"):
        made += f", made by the model “{model['name']}”"
        if model.get("training_images") is not None:
            made += f" (trained on {model['training_images']} images)"
        if generation.get("sampler") == "none":  # a GAN's
            made += f" in one pass from seed {generation.get('seed')}"
        elif generation.get("sampler"):
            steps = generation.get("steps")
            made += f" with {str(generation['sampler']).upper()}{f' in {steps} steps' if steps else ''}"
            made += f" from seed {generation.get('seed')}"
    if synthetic:
        text = f"{made}. No person was scanned for them."
    else:
        text = f"{made}, judged as if they were synthetic: their folder does not say that they are."
    if not card:
        return f"{text} They have not been judged yet: “brainldm evaluate” measures what is in them."
    if card.get("real"):
        real = card["real"]
        kind = f"{results.people} (made-up people with known anatomy)" if results.phantoms else results.people
        text += f" They are compared with {real['judged']} {kind} of “{real['folder']}”."
    return f"{text} {_measured_by(card['settings'])}"


def _measured_by(settings: Mapping[str, Any]) -> str:
    """Whose the volumes are; a scorecard of an earlier version names one instrument alone."""
    by = settings.get("instruments", {"synthetic": settings["instrument"]})
    if len(by) == 1:
        return f"Their volumes are those of “{by['synthetic']}”."
    if by["synthetic"] == by["real"]:
        return f"One instrument, “{by['real']}”, measured the volumes of both."
    return f"Their volumes are those of “{by['synthetic']}”, of the others those of “{by['real']}”."


def _recorded_is_measured(results: Results) -> bool:
    """Whether the volumes recorded of the reference people were found by an instrument too."""
    return bool(results.scorecard["settings"].get("recorded_volumes_were_measured"))


def _crosses(results: Results) -> str:
    """What the reference people show beside the brains."""
    apart = "the instrument’s own error"
    if _recorded_is_measured(results):
        apart = "how far two measurements of one person lie apart (for age, the predictor’s own error)"
    return f"Crosses are {results.people}: how far they lie from the line is {apart}."


def _of_the_instrument(results: Results) -> str:
    """What stands beside the brains where one asks whether they obey; nothing without reference people."""
    if not results.scorecard.get("real"):
        return ""
    no_truth = "; volumes were measured there too and are no truth" if _recorded_is_measured(results) else ""
    found = f"what it finds in {results.people} against what is recorded of them{no_truth}"
    return f" The reference is the instrument alone: {found}."


def _row(results: Results, key: str) -> Mapping[str, Any] | None:
    return next((r for r in results.scorecard.get("rows", ()) if r["key"] == key and r["group"] == "all"), None)


def _tiles(results: Results) -> Iterator[dict[str, str]]:
    """The few figures that are read first."""
    for key, title, note in (
        ("ventricles_mm3.pearson_r", "Ventricles obeyed", "Pearson r, asked and measured"),
        ("brain_mm3.pearson_r", "Brain volume obeyed", "Pearson r, asked and measured"),
        ("ms_ssim", "Likeness of two brains", "MS-SSIM; best is the real value"),
        ("nearest_is_training", "Nearest person was in training", "best is what chance gives"),
    ):
        row = _row(results, key)
        value = words.estimate(row["synthetic"], row["unit"]) if row else None
        if row is None or value is None:
            continue
        reference = words.estimate(row["reference"], row["unit"])
        unit = "%" if row["unit"]["shown"] == "%" else ""
        yield {
            "title": title,
            "value": value["value"] + unit,
            "interval": value["interval"] + (unit if value["interval"] else ""),
            "beside": f"{row['reference_is']}: {reference['value']}{unit}" if reference else "",
            "note": note,
            "n": str(row["synthetic"]["n"]),
        }


def _sections(results: Results) -> Iterator[dict[str, Any]]:
    """The scorecard: each section's rows of all images, and those of parts of them, a line a covariate and part."""
    for section, (title, lead) in words.SECTIONS.items():
        rows = [row for row in results.scorecard.get("rows", ()) if row["section"] == section]
        if not rows:
            continue
        said: set[str] = set()
        parts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        shown = []
        for row in rows:
            if row["group"] != "all":
                parts.setdefault((row["title"].split(":")[0], row["group"]), []).append(row)
                continue
            # What a figure means is said once, not for every covariate.
            shown.append({**row, "meaning": "" if row["meaning"] in said else row["meaning"]})
            said.add(row["meaning"])
        yield {
            "title": title,
            "lead": lead + (_of_the_instrument(results) if section == "conditioning" else ""),
            "rows": shown,
            "parts": [{"covariate": name, "group": group, "rows": found} for (name, group), found in parts.items()],
        }


def _mosaic(brains: Sequence[Brain]) -> list[Brain]:
    """Some brains with pictures, spread evenly over the plan."""
    pictured = [brain for brain in brains if brain.picture is not None]
    if len(pictured) <= MAX_MOSAIC_SYNTHETIC:
        return pictured
    step = len(pictured) / MAX_MOSAIC_SYNTHETIC
    return [pictured[int(k * step)] for k in range(MAX_MOSAIC_SYNTHETIC)]


def _facts(results: Results) -> Iterator[tuple[str, str]]:
    """Where this comes from, as name and value, at most MAX_FACTS of them."""
    card = results.scorecard
    told: dict[str, Any] = {}
    if card:
        told["evaluation"] = {"seed": card["seed"], **card["settings"], "versions": card["versions"]}
        told["seconds"] = card["seconds"]
    told["generation"] = _generation(results)
    description = results.provenance.get("dataset_description.json", {})
    told["dataset"] = {k: v for k, v in description.items() if k in ("Name", "GeneratedBy", "License", "BIDSVersion")}
    if card.get("real"):
        told["reference"] = {k: v for k, v in card["real"].items() if k != "provenance"}
    for count, (name, value) in enumerate(_flattened(told)):
        if count == MAX_FACTS:
            yield "and more", "see the JSON files in the folders"
            return
        yield name, value


def _flattened(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flattened(value, f"{name} · {key}" if name else str(key))
    elif isinstance(content, list) and any(isinstance(entry, Mapping | list) for entry in content):
        for number, entry in enumerate(content):
            yield from _flattened(entry, f"{name} {number + 1}" if len(content) > 1 else name)
    elif content is not None:
        text = (
            ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in content)
            if isinstance(content, list)
            else str(content)
        )
        yield name.replace("_", " "), text if len(text) <= 240 else f"{text[:240]}…"
