"""What is computed of pictures, codes and captions.

- `statistics`: Fréchet distance (FID), Inception Score, and the sums over processes that they need
- `features`, `inception`: networks whose features are compared; `blur` comes before them, `appearance` puts all together
- `matching`: CLIP score and retrieval
- `likelihood`: nats, and bits per dimension
- `reconstruction`, `codebook`: PSNR, SSIM; use of the codes, and what they look like
- `ranking`: whether a transformer finds a caption's codes among others
"""
