"""DomainNet: images of 345 classes in six domains."""

from pathlib import Path

from clrun.data.reading.assemble import Domains, Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, lines, load
from clrun.data.reading.image_files import joined, numbered
from clrun.data.reading.options import ImageReading, loader
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, did_you_mean

DOMAINNET = ("real", "quickdraw", "painting", "sketch", "infograph", "clipart")


@loader
def domainnet(reading: ImageReading, *, domains: list[str]) -> Dataset:
    """Return DomainNet (Peng et al. 2019, arXiv 1812.01754), cleaned: 409832 + 176743 images, 345 classes, 6 domains.

    Args:
        reading: the common options.
        domains: names of the domains, by task id.

    Raises:
        ConfigError: a domain is unknown, or files are missing.
    """
    for name in domains:
        if name not in DOMAINNET:
            hint = did_you_mean(name, DOMAINNET)
            raise ConfigError(f"dataset.domains: DomainNet has no '{name}'{hint} (has: {', '.join(DOMAINNET)})")

    def read(home: Path) -> Content:
        place = home / "domainnet"
        parts = {
            part: [[line.rsplit(" ", 1) for line in lines(place / f"{name}_{part}.txt")] for name in domains]
            for part in ("train", "test")
        }
        train, test = (
            [labelled(place, ((path, int(label)) for path, label in domain)) for domain in part]
            for part in parts.values()
        )
        known = {int(label): path.split("/")[1] for domain in parts["train"] for path, label in domain}
        names = [known.get(label, f"class {label}") for label in range(max(known) + 1)]
        return Content(joined(train), joined(test), names, {}, Domains(domains, numbered(train), numbered(test)))

    whole = sorted(domains) == sorted(DOMAINNET)
    benchmark = Benchmark(
        "domainnet",
        "domainnet/ with one folder and two lists (real_train.txt, real_test.txt) per domain",
        Published(409832, 176743, 345) if whole else Published(classes=345),
        read,
    )
    return load(benchmark, reading)
