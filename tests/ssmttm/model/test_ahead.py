"""The kernels of the studies' mixers compile for GPUs that are not here, and fit their shared memory."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ssmttm.kernel_devices import FOLDER
from tests.ssmttm.model.ahead import CHUNKS, SHARED_BYTES, Compiled, compiled_for, table

pytestmark = pytest.mark.verify
SCAN = {
    "_bmm_chunk_fwd_kernel",
    "_chunk_state_fwd_kernel",
    "_chunk_scan_fwd_kernel",
    "_chunk_state_bwd_db_kernel",
}


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[Compiled]]:
    if not FOLDER.is_dir():
        pytest.skip(f"no mamba-ssm in {FOLDER}: make verify installs it")
    with ThreadPoolExecutor() as pool:  # a process each
        return dict(zip(SHARED_BYTES, pool.map(compiled_for, SHARED_BYTES), strict=True))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_fits_the_shared_memory_in_some_configuration(compiled, capability, chunk):
    found = [one for one in compiled[capability] if one.chunk == chunk]
    fitting: dict[str, list[Compiled]] = defaultdict(list)
    for one in found:
        fitting[one.kernel] += [one] if one.fits else []
    print(table(found))
    assert fitting.keys() > SCAN
    assert all(fitting.values()), f"nothing fits of {[name for name, fits in fitting.items() if not fits]}"


@pytest.mark.parametrize("capability", [80, 90])
def test_gpus_of_data_centres_have_all_configurations_to_choose_from(compiled, capability):
    assert [one for one in compiled[capability] if not one.fits] == []
