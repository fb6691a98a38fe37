"""Which versions of other libraries the integrations were written for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def require(distribution: str, series: Sequence[str]) -> None:
    """Raises ImportError unless a library is installed in one of the versions that its integration was written for.

    Args:
        distribution: its name as pip knows it.
        series: beginnings of its version, such as "0.4".
    """
    known = " or ".join(f"{each}.*" for each in series)
    try:
        found = version(distribution)
    except PackageNotFoundError as error:
        raise ImportError(
            f"{distribution} is not installed: pip install '{distribution}=={series[-1]}.*'"
        ) from error
    if not any(found == each or found.startswith(f"{each}.") for each in series):
        raise ImportError(
            f"this integration was written for {distribution} {known}, installed is {found}, whose interface may be "
            f"another one: install '{distribution}=={series[-1]}.*'"
        )


def require_interface(host: type, names: Sequence[str], known: str) -> None:
    """Raises ImportError unless a host's class has what its integration overrides or calls.

    For hosts that are run from a checkout, whose version no package says.

    Args:
        host: the class.
        names: of its methods and attributes.
        known: what the integration was written for.
    """
    missing = [name for name in names if not hasattr(host, name)]
    if missing:
        raise ImportError(
            f"this integration was written for {known}: the {host.__name__} that is there has no "
            f"{', '.join(missing)}; its interface is another one"
        )
