"""Quantised weights on disk: made once, by whichever process comes first, and attached by every later one.

    store/
    ├── entries/KEY/       manifest.json, weights.safetensors, used (touched at each use)
    ├── drafts/            entries being written; nobody reads them
    ├── damaged/           entries that were found to be so, set aside
    ├── light/             models whose original weights are not kept: all their other files
    ├── known/             digests of checkpoints' files, by what the file system says of them
    └── locks/             one for each kind of entry, held while one is made

An entry appears under `entries` by a rename, after all its bytes are on the disk, and never changes after that.
"""

from .attached import Attached
from .draft import Draft
from .entry import DamagedError, Entry, Kind, Manifest, size_of
from .known import Look
from .restart import boot_id
from .store import Store, StoreUnavailableError, open_store

__all__ = [
    "Attached",
    "DamagedError",
    "Draft",
    "Entry",
    "Kind",
    "Look",
    "Manifest",
    "Store",
    "StoreUnavailableError",
    "boot_id",
    "open_store",
    "size_of",
]
