"""Frames of video files and webcams, by OpenCV or PyAV, whichever is installed."""
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["VIDEOS", "frames", "is_video", "webcam_of"]

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".mts", ".m2ts", ".3gp")


def is_video(file: str | Path) -> bool:
    """Whether the ending is one of a video, or the name that of a webcam."""
    return Path(file).suffix.lower() in VIDEOS or webcam_of(str(file)) is not None


def webcam_of(name: str) -> int | None:
    """The number of a webcam called ``webcam:0`` or, where no file is called so, ``0``; None of other names."""
    found = re.fullmatch(r"(webcam:)?(\d{1,3})", name)
    return int(found[2]) if found and (found[1] or not os.path.lexists(name)) else None


def frames(source: str | Path, max_pixels: int) -> Iterator[np.ndarray]:
    """The frames ``[H, W, 3]`` uint8 in RGB of a video file or a webcam, one after the other.

    Args:
        source: The file, or ``webcam:0``.
        max_pixels: Largest frame.

    Raises:
        ModuleNotFoundError: Neither OpenCV nor PyAV is installed.
        ValueError: It cannot be opened or read, or has larger frames.
    """
    number = webcam_of(str(source))
    if number is None and not Path(source).is_file():
        raise ValueError("there is no such file")
    read = None
    for package, reader in (("cv2", _by_opencv), ("av", _by_av)):
        try:
            read = reader(__import__(package), source, number)
            break
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
    if read is None:
        raise ModuleNotFoundError(
            f"{source} is a video, which needs OpenCV or PyAV: pip install opencv-python-headless (or av)")
    count = 0
    for frame in read:
        if frame.shape[0] * frame.shape[1] > max_pixels:
            raise ValueError(f"its frames have {frame.shape[1]} x {frame.shape[0]} pixels, more than max_pixels "
                             f"({max_pixels}) allows")
        count += 1
        yield frame
    if not count:
        raise ValueError("no frame of it can be decoded")


def _by_opencv(cv2: Any, source: str | Path, number: int | None) -> Iterator[np.ndarray]:
    video = cv2.VideoCapture(str(source) if number is None else number)
    try:
        if not video.isOpened():
            raise ValueError("it cannot be opened as a video" if number is None else "there is no such webcam")
        while True:
            good, frame = video.read()
            if not good:
                return
            yield np.ascontiguousarray(frame[..., ::-1])
    finally:
        video.release()


def _by_av(av: Any, source: str | Path, number: int | None) -> Iterator[np.ndarray]:
    try:
        if number is None:
            # Only the file itself: a playlist would name others.
            video = av.open(str(source), options={"protocol_whitelist": "file"})
        else:
            video = av.open(f"/dev/video{number}", format="v4l2")
    except Exception as error:  # of classes of its own
        raise ValueError("it cannot be opened as a video" if number is None else "there is no such webcam") from error
    with video:
        if not video.streams.video:
            raise ValueError("it has no pictures")
        try:
            for frame in video.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise ValueError(f"it cannot be read to its end: {' '.join(str(error).split())}") from error
