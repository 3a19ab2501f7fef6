"""Decoding videos: each frame at its time, upright and exact in any container; damage is an error, never a guess."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from data_pipeline.decode import DecodeError
from data_pipeline.video_decode import DecoderMissingError, Video, video_member
from tests.data_pipeline.clips import clip, decoded_from_the_start, real_clips, scene, sound_only, turned

OPEN_GROUPS = {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"}
KINDS: dict[str, dict] = {
    "B-frames": {"options": {"g": "12", "bf": "3"}},
    "no B-frames": {"options": {"g": "12", "bf": "0"}},
    "one group": {"options": {"g": "250"}},
    "open groups": {"options": OPEN_GROUPS},
    "open groups, mkv": {"options": OPEN_GROUPS, "container": "mkv"},
    "refreshed bit by bit": {"options": {"g": "12", "bf": "0", "x264-params": "intra-refresh=1"}},
    "variable rate": {"ticks": np.cumsum([0] + [20, 40, 25] * 13).tolist()},
    "begins late": {"ticks": [600 + 24 * i for i in range(40)]},
    "begins late, mkv": {"ticks": [600 + 24 * i for i in range(40)], "container": "mkv"},
    "with sound": {"with_audio": True},
    "index first": {"container_options": {"movflags": "faststart"}},
    "fragments": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "odd sides": {"size": (63, 47), "pix_fmt": "yuv444p"},
    "grey": {"pix_fmt": "gray"},
    "10 bits": {"pix_fmt": "yuv420p10le"},
    "grey of 16 bits": {"container": "mkv", "codec": "ffv1", "pix_fmt": "gray16le", "options": {"level": "3"}},
    "VP9": {"container": "webm", "codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8"}},
    "VP8 with hidden frames": {
        "container": "webm",
        "codec": "libvpx",
        "options": {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "7", "b": "30k"},
    },
    "HEVC": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12"}},
    "MPEG-4 in mov": {"container": "mov", "codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "H.264 in avi": {"container": "avi"},
    "MPEG-4 in avi": {"container": "avi", "codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "one frame": {"num_frames": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_at_random_equals_decoding_from_the_start(kind: str) -> None:
    data = clip(**KINDS[kind])
    plain = decoded_from_the_start(data)
    with Video(data) as video:
        assert video.facts.num_frames == len(video.times) == len(plain) == KINDS[kind].get("num_frames", 40)
        for index in np.random.default_rng(0).permutation(len(plain)).tolist():
            assert np.array_equal(video.frames([index])[0], plain[index]), index
        wanted = [i % len(plain) for i in (7, 3, 3, 39, 0, 21, 25, 7)]
        assert np.array_equal(video.frames(wanted), np.stack([plain[i] for i in wanted]))
        assert video.frames(range(len(plain))).shape == (len(plain), video.facts.height, video.facts.width, 3)


@pytest.mark.parametrize("path", real_clips(), ids=lambda path: path.name)
def test_frames_of_a_real_clip_equal_decoding_from_the_start(path: Path) -> None:
    data = path.read_bytes()
    with Video(data) as video, av.open(io.BytesIO(data), "r") as container:
        wanted = sorted(np.random.default_rng(1).choice(len(video.times), 12, replace=False).tolist())
        # A copy: PyAV's array may look into a buffer that the decoder uses again.
        plain = [f.to_ndarray(format="rgb24").copy() for i, f in enumerate(container.decode(video=0)) if i in wanted]
        assert np.array_equal(video.frames(wanted[::-1]), np.stack(plain[::-1]))
        assert video.facts.num_frames == container.streams.video[0].frames


def test_times_are_those_of_presentation_whatever_the_rate_and_begin_at_0() -> None:
    ticks = np.cumsum([0] + [20, 40, 25] * 13)
    for begin in (0, 600):
        for container, exact in (("mp4", 1e-4), ("mkv", 1e-3)):
            with Video(clip(ticks=(ticks + begin).tolist(), container=container)) as video:
                assert np.allclose(video.times, ticks / 600, atol=exact)
                assert video.times[0] == 0
                assert video.facts.is_variable
                assert video.facts.fps == pytest.approx(39 / (ticks[-1] / 600), rel=1e-3)
                assert abs(video.frames([20])[0].astype(int) - scene(20)).mean() < 8
    for container in ("mp4", "mkv", "webm", "avi"):  # mkv and webm round to milliseconds
        codec, options = ("libvpx-vp9", {"cpu-used": "8"}) if container == "webm" else ("libx264", {"bf": "2"})
        with Video(clip(30, rate=30, container=container, codec=codec, options=options)) as video:
            assert np.allclose(video.times, np.arange(30) / 30, atol=1e-3)
            assert not video.facts.is_variable
            assert video.facts.duration_s == pytest.approx(1, abs=2e-3)


def test_an_edit_list_cuts_off_what_it_says(tmp_path: Path) -> None:
    """Copying packets from the middle of a group on gives a file that begins with frames nobody shall see."""
    buffer, source_bytes = io.BytesIO(), io.BytesIO(clip(options={"g": "20", "bf": "0"}))
    with av.open(source_bytes, "r") as source, av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        step = 512
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts - 5 * step, packet.dts - 5 * step
                packet.stream = stream
                out.mux(packet)
    data = buffer.getvalue()
    plain = decoded_from_the_start(data)
    with Video(data) as video:
        assert len(video.times) == len(plain) == 35
        assert np.array_equal(video.frames([0, 34, 17]), np.stack([plain[0], plain[34], plain[17]]))
        assert abs(video.frames([0])[0].astype(int) - scene(5)).mean() < 8


@pytest.mark.parametrize(
    ("turn", "rotation", "upright"),
    [
        ((0, 1, -1, 0), 90, lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), 180, lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), 270, lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), 180, lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), 0, lambda p: p[::-1]),
    ],
)
def test_frames_stand_upright_as_the_display_matrix_says(turn: tuple, rotation: int, upright) -> None:  # noqa: ANN001
    data = clip(6)
    with Video(data) as plain, Video(turned(data, *turn)) as video:
        assert np.array_equal(video.frames([4])[0], upright(plain.frames([4])[0]))
        assert video.facts.rotation == rotation
        assert (video.facts.height, video.facts.width) == video.frames([0]).shape[1:3]


def test_facts_name_what_the_video_is() -> None:
    with Video(clip(50, size=(96, 64), rate=20)) as video:
        facts = video.facts
    assert (facts.num_frames, facts.width, facts.height, facts.rotation) == (50, 96, 64, 0)
    assert (facts.codec, facts.is_variable) == ("h264", False)
    assert (facts.fps, facts.duration_s) == pytest.approx((20, 2.5))


def no_frames(container: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.start_encoding()
    return buffer.getvalue()


VP9 = clip(20, container="webm", codec="libvpx-vp9", options={"g": "12", "cpu-used": "8"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot decode 0 bytes as a video"),
        (b"hello" * 100, "cannot decode 500 bytes as a video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "cannot decode .* bytes as a video"),
        (clip(4)[:1000], "truncated: its mdat box ends at byte"),
        (clip().rpartition(b"moov")[0][:-4], "truncated: it has no moov box"),
        (clip(container_options={"movflags": "faststart"})[:-900], "truncated: its mdat box ends at byte"),
        (VP9[:-700], "truncated: its segment ends at byte"),
        (VP9[:900] + bytes(300) + VP9[1200:], "damaged: what begins at byte"),
        (clip(20, container="avi")[:-3000], "truncated: its RIFF chunk ends at byte"),
        (sound_only(), "it has no video stream, only audio"),
        (no_frames("mp4"), "it has no video stream$"),
        (clip(0, container="mkv", with_audio=True), "its video stream holds no frame"),
        (no_frames("matroska"), "it ends before its first frame"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_whole_video_is_refused_when_it_is_opened(data: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        Video(data)


def test_the_cover_of_an_audio_file_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(io.BytesIO(sound_only()), "r") as source, av.open(buffer, "w", format="mp4") as output:
        sound = output.add_stream_from_template(source.streams.audio[0])
        cover = output.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        output.mux(cover.encode(av.VideoFrame.from_ndarray(scene(1))) + cover.encode(None))
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = sound
                output.mux(packet)
    with pytest.raises(DecodeError, match="no video stream"):
        Video(buffer.getvalue())


def test_damage_is_an_error_on_the_way_to_a_wanted_frame_and_nowhere_else() -> None:
    data = clip(48, size=(160, 128), options={"g": "12", "bf": "2", "x264-params": "scenecut=0"})
    with av.open(io.BytesIO(data), "r") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        hurt = next(packet for packet in packets[14:] if not packet.is_keyframe)
        assert hurt.pos is not None
        middle = hurt.pos + 5  # behind the length and the kind of the slice
        broken = data[:middle] + b"\xff" * (hurt.size - 5) + data[middle + hurt.size - 5 :]
    with Video(data) as whole, Video(broken) as video:
        assert np.array_equal(video.times, whole.times)
        for group in (range(12), range(24, 48)):
            assert np.array_equal(video.frames(group), whole.frames(group))
        with pytest.raises(DecodeError, match="damaged at packet 1"):
            video.frames(range(12, 24))
        with pytest.raises(DecodeError, match="damaged at packet 1"):
            video.frames([23])


def test_a_video_that_begins_within_a_group_is_shown_from_its_first_key_frame_on() -> None:
    """A recording cut out of a stream; what comes before the key frame could only be grey."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip()), "r") as source, av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(video=0))[5:]:
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    whole = decoded_from_the_start(clip())
    with Video(buffer.getvalue()) as video:
        assert len(video.times) == 28
        assert video.times[0] == 0
        assert np.array_equal(video.frames([0])[0], whole[12])


def test_frames_that_do_not_exist_are_not_asked_for() -> None:
    with Video(clip(5)) as video:
        for wrong in ([5], [-1], [0, 9]):
            with pytest.raises(IndexError, match="of a video of 5"):
                video.frames(wrong)
        assert video.frames([]).shape[0] == 0


def test_a_sample_without_a_video_is_named() -> None:
    assert video_member({"cls": b"1", "webm": b"x"}) == b"x"
    with pytest.raises(DecodeError, match=r"no video among the members \['cls', 'jpg'\]"):
        video_member({"jpg": b"", "cls": b""})


def test_a_decoder_that_is_not_there_is_named_with_the_way_out() -> None:
    with pytest.raises(DecoderMissingError, match="choose pyav or torchcodec"):
        Video(clip(1), "decord")  # pyright: ignore[reportArgumentType]
    try:
        import torchcodec  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):
        with pytest.raises(DecoderMissingError, match="install torchcodec and FFmpeg, or set decoder to pyav"):
            Video(clip(1), "torchcodec")


@pytest.mark.parametrize("kind", ["B-frames", "variable rate", "open groups", "VP9"])
def test_torchcodec_gives_the_same_frames(kind: str) -> None:
    try:
        import torchcodec.decoders  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):
        pytest.skip("torchcodec is not installed")
    data = clip(**KINDS[kind])
    with Video(data) as ours, Video(data, "torchcodec") as theirs:
        wanted = [3, 39, 20, 20, 0]
        difference = ours.frames(wanted).astype(int) - theirs.frames(wanted)
    assert abs(difference).max() <= 2
