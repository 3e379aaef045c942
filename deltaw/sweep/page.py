"""stub"""

from deltaw.sweep.folder import SweepFolder
from deltaw.sweep.standing import Ranking


def write_page(sweep: SweepFolder, ranking: Ranking) -> None:
    """."""
