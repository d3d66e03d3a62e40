// Builds the page into dist/, which the service embeds. With --tests, builds the tests into .build/ instead.
import { cp, mkdir, readdir, rm } from "node:fs/promises";
import { build } from "esbuild";

const root = new URL(".", import.meta.url).pathname;

async function page() {
  await rm(`${root}dist`, { recursive: true, force: true });
  await mkdir(`${root}dist`, { recursive: true });
  await build({
    absWorkingDir: root,
    entryPoints: { app: "src/main.ts" },
    outdir: "dist",
    bundle: true,
    minify: true,
    format: "esm",
    target: ["es2022"],
    legalComments: "inline",
    logLevel: "warning",
  });
  for (const name of ["index.html", "favicon.svg"]) await cp(`${root}src/${name}`, `${root}dist/${name}`);
}

async function tests(kind, folder) {
  const names = (await readdir(`${root}${folder}`)).filter((name) => name.endsWith(".test.ts"));
  await rm(`${root}.build/${kind}`, { recursive: true, force: true });
  await build({
    absWorkingDir: root,
    entryPoints: names.map((name) => `${folder}/${name}`),
    outdir: `.build/${kind}`,
    outExtension: { ".js": ".mjs" },
    bundle: true,
    packages: "external",
    platform: "node",
    format: "esm",
    target: ["node18"],
    logLevel: "warning",
  });
}

if (process.argv.includes("--tests")) await Promise.all([tests("unit", "test"), tests("e2e", "e2e")]);
else await page();
