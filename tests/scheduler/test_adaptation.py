"""The adaptive batch size and the load-dependent profile."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.scheduling import AdaptationConfig
from jaxserve.scheduler.adaptation import AdaptiveBatchSize, LoadProfile

CONFIG = AdaptationConfig()
NAMES = ("latency", "balanced", "throughput")


def test_batch_size_follows_the_moving_average_of_prompts():
    size = AdaptiveBatchSize(CONFIG)
    assert size.limit == CONFIG.max_batch_size
    size.observe(100)
    assert size.limit == 81  # 8192 / 100
    size.observe(1100)
    assert size.average == 200.0  # 0.9 * 100 + 0.1 * 1100
    assert size.limit == 40


def test_batch_size_stays_within_its_bounds():
    size = AdaptiveBatchSize(CONFIG)
    size.observe(1)
    assert size.limit == 256
    for _ in range(200):
        size.observe(100_000)
    assert size.limit == 8


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=50))
def test_batch_size_times_average_is_about_the_target(prompts: list[int]):
    size = AdaptiveBatchSize(CONFIG)
    for prompt in prompts:
        size.observe(prompt)
    assert size.average is not None
    assert min(prompts) <= size.average * 1.000001
    if CONFIG.min_batch_size < size.limit < CONFIG.max_batch_size:
        assert size.limit * size.average <= CONFIG.target_batch_tokens < (size.limit + 1) * size.average


def test_profiles_have_their_figures():
    profile = LoadProfile(AdaptationConfig(load_hysteresis=0.0))
    found = {load: profile.update(load) for load in (0.0, 0.29, 0.3, 0.69, 0.7, 5.0)}
    assert [found[load].name for load in found] == [
        "latency", "latency", "balanced", "balanced", "throughput", "throughput",
    ]  # fmt: skip
    assert (found[0.0].max_num_batched_tokens, found[0.0].enable_chunked_prefill) == (512, False)
    assert (found[0.3].max_num_batched_tokens, found[0.3].enable_chunked_prefill) == (2048, True)
    assert (found[0.7].max_num_batched_tokens, found[0.7].enable_chunked_prefill) == (4096, True)


def test_hysteresis_keeps_the_profile_around_a_bound():
    profile = LoadProfile(AdaptationConfig(load_hysteresis=0.05))
    loads = (0.2, 0.31, 0.34, 0.36, 0.31, 0.26, 0.24, 0.9, 0.66, 0.64, 0.74, 0.76, 0.1)
    assert [profile.update(load).name for load in loads] == [
        "latency", "latency", "latency", "balanced", "balanced", "balanced", "latency",
        "throughput", "throughput", "balanced", "balanced", "throughput", "latency",
    ]  # fmt: skip


@given(st.lists(st.floats(0.0, 1.5), max_size=60), st.floats(0.0, 0.3))
def test_a_profile_changes_only_past_a_bound_by_the_margin(loads: list[float], margin: float):
    profile = LoadProfile(AdaptationConfig(load_hysteresis=margin))
    before = None
    for load in loads:
        now = NAMES.index(profile.update(load).name)
        if before is None:
            assert now == (load >= 0.3) + (load >= 0.7)
        for bound, above in ((0.3, 1), (0.7, 2)):
            if load >= bound + margin:
                assert now >= above
            elif load < bound - margin:
                assert now < above
            elif before is not None:
                assert (now >= above) == (before >= above)
        before = now
