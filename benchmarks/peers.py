"""Where the peers are that no package index has: in checkouts that the user names. None of their code is in here.

``LRLORA_PEERS`` names a folder that holds the checkouts under their repositories' names; a variable per peer names one
checkout, wherever it is.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.providers import Unavailable

FOLDER = "LRLORA_PEERS"


@dataclass(frozen=True)
class Peer:
    """A repository of GitHub, and how its ops are imported.

    Attributes:
        repository: ``owner/name``; ``name`` is the checkout's name in the folder of ``LRLORA_PEERS``.
        variable: Names the checkout itself.
        path: The folder in the checkout that imports start from.
        module: What is imported.
        seen: The commit whose calling conventions the adapter follows.
    """

    repository: str
    variable: str
    path: str
    module: str
    seen: str

    def load(self) -> Any:
        """The module.

        Raises:
            Unavailable: There is no checkout, it has no such folder, or the import fails.
        """
        named, name = os.environ.get(self.variable), self.repository.rpartition("/")[2]
        if named is None and FOLDER in os.environ:
            named = str(Path(os.environ[FOLDER], name))
        if named is None:
            raise Unavailable(
                f"set {self.variable} to a checkout of github.com/{self.repository} (seen at {self.seen}), or {FOLDER} "
                f"to a folder with one named {name}"
            )
        folder = Path(named, self.path)
        if not folder.is_dir():
            raise Unavailable(
                f"there is no folder {folder}; {self.variable} or {FOLDER} must lead to a checkout of "
                f"github.com/{self.repository}"
            )
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        try:
            return importlib.import_module(self.module)
        except Exception as error:  # whatever a foreign package does when it is imported here
            reason = f"{type(error).__name__}: {error}"
            raise Unavailable(f"{self.module} of {named} cannot be imported ({reason})") from error


AXOLOTL = Peer(
    "axolotl-ai-cloud/axolotl",
    "LRLORA_AXOLOTL",
    "src/axolotl/integrations/kernels/libs",
    "scattermoe_lora",
    "067b021c8b87",
)
LORAFUSION = Peer("CentML/lorafusion", "LRLORA_LORAFUSION", "", "lorafusion.ops.lora_v1", "c48d7fdb1b54")
SCATTERMOE = Peer("shawntan/scattermoe", "LRLORA_SCATTERMOE", "", "scattermoe", "47b5e1502e5a")
LIGER = Peer("linkedin/Liger-Kernel", "LRLORA_LIGER", "src", "liger_kernel.ops.fused_moe", "ead96b618e5c")
PEERS = (AXOLOTL, LORAFUSION, SCATTERMOE, LIGER)
