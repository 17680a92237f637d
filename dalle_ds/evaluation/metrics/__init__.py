"""What is computed of images, codes and captions.

- `frechet`: Fréchet distance (FID), Inception Score, and the sums over processes that they need
- `features`: networks whose features are compared, and the blur before
- `matching`: CLIP score and retrieval
- `likelihood`: nats, bits per dimension; whether a transformer finds a caption's codes among others
- `dvae`: PSNR, SSIM; use of the codes, and what they look like
"""
