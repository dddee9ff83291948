"""Self-contained pages from templates that escape all texts; round numbers for their axes."""

import base64
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxpref.files import replacing
from mlxpref.text import format_duration

if TYPE_CHECKING:
    from jinja2 import Template

_AXIS_STEPS = 6  # about


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from one of the templates in `report/templates`, as it is made: values may be iterators."""
    with replacing(path) as temporary:
        _template(template).stream(**values).dump(str(temporary), "utf-8")


def render_page(template: str, **values: Any) -> str:
    """A page from one of the templates in `report/templates`."""
    return _template(template).render(**values)


def _template(name: str) -> "Template":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlxpref.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["duration"] = format_duration
    return environment.get_template(name)


def page_script(name: str) -> dict[str, Any]:
    """A script of `report/templates` for a template: its `script`, and the `script_hash` for the page's policy."""
    from markupsafe import Markup

    script = (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "script_hash": f"sha256-{digest}"}


def even_ticks(low: float, high: float) -> list[float]:
    """Round numbers in even steps, the first at or below `low`, the last at or above `high`."""
    least = max(high - low, 1e-6) / _AXIS_STEPS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= least)
    first = math.floor(low / step)
    return [step * i for i in range(first, max(math.ceil(high / step), first + 1) + 1)]
