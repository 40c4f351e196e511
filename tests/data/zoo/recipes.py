"""How FFmpeg makes the files of the zoo: two seconds of 128 x 96 pixels, 24 frames a second.

`@name` in a recipe is another file of the zoo, which is made first.
"""

_PLAIN = "-f lavfi -i testsrc2=size=128x96:rate=24:duration=2"
_ODD = "-f lavfi -i testsrc2=size=131x97:rate=24:duration=2"
_TONE = "-f lavfi -i sine=duration=2"
_X264 = "-c:v libx264 -preset veryfast -threads 1"
_X265 = "-c:v libx265 -preset ultrafast -x265-params log-level=none:pools=1:keyint=12"
_VP9 = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -threads 1 -g 12"
_VP9_SLOW = "-c:v libvpx-vp9 -cpu-used 8 -threads 1 -lag-in-frames 16"
_VP8 = "-c:v libvpx -deadline realtime -cpu-used 8 -threads 1 -g 12"
_SVT = "-c:v libsvtav1 -preset 10 -g 12 -svtav1-params lp=1"
_420 = "-pix_fmt yuv420p"
_DEEP = "-pix_fmt yuv420p10le"
_OPEN = "-x264-params open-gop=1:keyint=12:bframes=3:b-adapt=0"
# Gaps of one to seven frames, then a second and a half of nothing.
_VARIABLE = (
    r"-vf select=not(mod(n\,7))+lt(mod(n\,11)\,3),setpts=PTS+gte(N\,9)*1.5/TB -vsync vfr "
    r"-enc_time_base 1/24"
)

GOOD: dict[str, str] = {
    # H.264
    "h264.mp4": f"{_PLAIN} {_X264} {_420} -g 12",
    "h264.mkv": "-i @h264.mp4 -c copy",
    "h264.ts": "-i @h264.mp4 -c copy",
    "h264.flv": "-i @h264.mp4 -c copy",
    "open-gop.mp4": f"{_PLAIN} {_X264} {_420} {_OPEN}",
    "open-gop.mkv": "-i @open-gop.mp4 -c copy",
    "open-gop.ts": "-i @open-gop.mp4 -c copy",
    "long-gop.mp4": f"{_PLAIN} {_X264} {_420} -g 1000 -bf 8 -x264-params b-adapt=0",
    "intra-only.mp4": f"{_PLAIN} {_X264} {_420} -g 1",
    "intra-refresh.mp4": f"{_PLAIN} {_X264} {_420} -x264-params intra-refresh=1:keyint=12",
    "full-range.mp4": f"{_PLAIN} {_X264} -pix_fmt yuvj420p",
    "bt709.mp4": f"{_PLAIN} {_X264} {_420} -vf scale=out_color_matrix=bt709 -colorspace bt709",
    "h264-10bit.mp4": f"{_PLAIN} {_X264} {_DEEP} -g 12",
    "h264-odd.mp4": f"{_ODD} {_X264} -pix_fmt yuv444p -g 12",
    "interlaced.mp4": f"{_PLAIN} {_X264} {_420} -flags +ilme+ildct -g 12",
    "fragmented.mp4": "-i @h264.mp4 -c copy -movflags frag_keyframe+empty_moov+default_base_moof",
    # HEVC, VP9, VP8, AV1
    "hevc.mp4": f"{_PLAIN} {_X265} {_420}",
    "hevc-open-gop.mp4": f"{_PLAIN} {_X265}:open-gop=1:bframes=3 {_420}",
    "hevc-open-gop.ts": "-i @hevc-open-gop.mp4 -c copy",
    "hevc-10bit.mp4": f"{_PLAIN} {_X265} {_DEEP}",
    "vp9.webm": f"{_PLAIN} {_VP9} {_420}",
    "vp9-hidden-frames.webm": f"{_PLAIN} {_VP9_SLOW} {_420}",
    "vp9-10bit.webm": f"{_PLAIN} {_VP9} {_DEEP}",
    "vp9-odd.webm": f"{_ODD} {_VP9} {_420}",
    "vp8.webm": f"{_PLAIN} {_VP8} {_420}",
    "vp8-odd.webm": f"{_ODD} {_VP8} {_420}",
    "av1.mp4": f"{_PLAIN} {_SVT} {_420}",
    "av1-10bit.mp4": f"{_PLAIN} {_SVT} {_DEEP}",
    # Older ones
    "mjpeg.avi": f"{_PLAIN} -c:v mjpeg -pix_fmt yuvj420p",
    "mjpeg.mov": f"{_PLAIN} -c:v mjpeg -pix_fmt yuvj422p",
    "mpeg4.mp4": f"{_PLAIN} -c:v mpeg4 -bf 2 -g 12",
    "mpeg4.avi": f"{_PLAIN} -c:v mpeg4 -bf 2 -g 12",
    "mpeg2.mpg": f"{_PLAIN} -c:v mpeg2video -bf 2 -g 12",
    "mpeg2.ts": f"{_PLAIN} -c:v mpeg2video -bf 2 -g 12 -flags +ilme+ildct",
    "wmv2.wmv": f"{_PLAIN} -c:v wmv2 -g 12",
    "flv1.flv": f"{_PLAIN} -c:v flv1 -g 12",
    "theora.ogv": f"{_PLAIN} -c:v libtheora -g 12",
    "ffv1-422-10bit.mkv": f"{_PLAIN} -c:v ffv1 -pix_fmt yuv422p10le",
    "animation.gif": f"{_PLAIN} -r 12",
    # Time
    "variable.mp4": f"{_PLAIN} {_X264} {_420} -g 12 {_VARIABLE}",
    "variable.mkv": "-i @variable.mp4 -c copy",
    "variable.ts": "-i @variable.mp4 -c copy",
    "variable.webm": f"{_PLAIN} {_VP9} {_420} {_VARIABLE}",
    "ntsc.mp4": f"-f lavfi -i testsrc2=size=128x96:rate=30000/1001:duration=2 {_X264} {_420} -g 12",
    "edit-list.mp4": "-ss 0.7 -i @h264.mp4 -c copy",
    "edit-list-open-gop.mp4": "-ss 0.7 -i @open-gop.mp4 -c copy",
    "late.mp4": f"-itsoffset 0.6 -i @h264.mp4 {_TONE} -c:v copy -c:a aac -map 0:v -map 1:a",
    "late.mkv": "-i @h264.mp4 -c copy -output_ts_offset 100",
    "late.ts": "-i @h264.mp4 -c copy -output_ts_offset 5000",
    # 33 bits of a 90 kHz clock are over after 95443.7 seconds.
    "clock-over.ts": "-i @h264.mp4 -c copy -output_ts_offset 95441.5",
    "no-timestamps.avi": f"{_PLAIN} {_X264} {_420} -g 12 -bf 0",
    "no-timestamps-b-frames.avi": f"{_PLAIN} {_X264} {_420} -g 12 -bf 2",
    "bare.h264": "-i @h264.mp4 -c copy -bsf:v h264_mp4toannexb",
    "bare.hevc": "-i @hevc.mp4 -c copy -bsf:v hevc_mp4toannexb",
    # Other streams, few frames
    "sound-first.mp4": f"{_TONE} -i @h264.mp4 -map 0:a -map 1:v -c:v copy -c:a aac",
    "cover-first.mp4": (
        "-i @cover.png -i @h264.mp4 -map 0 -map 1 -c copy -disposition:v:0 attached_pic"
    ),
    "one-frame.mp4": f"{_PLAIN} {_X264} {_420} -frames:v 1",
    "one-frame.webm": f"{_PLAIN} {_VP9} {_420} -frames:v 1",
    "two-frames.mp4": f"{_PLAIN} {_X264} {_420} -frames:v 2",
}
PARTS: dict[str, str] = {
    "cover.png": f"{_PLAIN} -frames:v 1",
    "sound.m4a": f"{_TONE} -c:a aac",
    "plain.y4m": f"{_PLAIN} -pix_fmt yuv420p",
    "cover-only.mp4": (
        "-i @cover.png -i @sound.m4a -map 0 -map 1 -c copy -disposition:v:0 attached_pic"
    ),
    "index-first.mp4": "-i @open-gop.mp4 -c copy -movflags faststart",
}
# Degrees counterclockwise by which the display matrix turns the picture.
TURNED = {"turned-90.mp4": 90, "turned-180.mp4": 180, "turned-270.mov": 270}
# FFmpeg's versions convert these to 24-bit colours differently (where colour samples lie, fields):
# they are compared as they are decoded.
PLANES = {
    "h264-10bit.mp4": "yuv420p10le",
    "hevc-10bit.mp4": "yuv420p10le",
    "vp9-10bit.webm": "yuv420p10le",
    "av1-10bit.mp4": "yuv420p10le",
    "interlaced.mp4": "yuv420p",
    "mpeg2.ts": "yuv420p",
}
