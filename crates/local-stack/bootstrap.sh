# Sourced by ./run and ./test: finds or installs the prerequisites of the build and the servers, then builds the
# programs. Everything else is done by the programs local-stack and system-tests. As root on Debian, missing packages are installed with
# apt and announced. Otherwise the script lists everything that is missing and prints one command that installs it.
# Nothing here calls sudo.
# shellcheck shell=bash

toolchain=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' rust-toolchain.toml)
target=${CARGO_TARGET_DIR:-target}
[ -z "${HOME:-}" ] || [ ! -d "$HOME/.cargo/bin" ] || PATH="$HOME/.cargo/bin:$PATH"

say() { printf '%s\n' "$*" >&2; }
die() { say "fail $*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Prints the major version of a JVM, such as 17, 21 or 8. Prints nothing if the JVM does not run.
java_major() {
  "$1" -version 2>&1 | sed -n '1s/.*version "\(1\.\)\{0,1\}\([0-9]*\).*/\2/p'
}

# Sets JAVA_HOME to a JDK 17. Returns 1 if none was found. Returns 2 if JAVA_HOME is set to anything else, and describes
# the problem in java_problem.
find_java() {
  local candidate major
  if [ -n "${JAVA_HOME:-}" ]; then
    major=$(java_major "$JAVA_HOME/bin/java")
    [ "$major" != 17 ] || return 0
    if [ -n "$major" ]; then major="is Java $major"; else major="has no bin/java"; fi
    java_problem="JAVA_HOME=$JAVA_HOME $major, but Cassandra 5.0 needs Java 17; set JAVA_HOME to a JDK 17 or unset it"
    return 2
  fi
  if have java && [ "$(java_major java)" = 17 ]; then
    candidate=$(readlink -f "$(command -v java)")
    case $candidate in
      */bin/java) export JAVA_HOME=${candidate%/bin/java}; return 0 ;;
    esac
  fi
  for candidate in /usr/lib/jvm/*/; do
    if [ -x "${candidate}bin/java" ] && [ "$(java_major "${candidate}bin/java")" = 17 ]; then
      export JAVA_HOME=${candidate%/}
      return 0
    fi
  done
  return 1
}

node_is_missing() { ! have node || ! have npm || [ "$(node -p 'process.versions.node.split(".")[0] >= 18')" != true ]; }

# With rustup, the pinned toolchain must be installed. Without rustup, any rustc of that version or later is accepted.
rust_is_missing() {
  if have rustup; then
    ! rustup toolchain list 2>/dev/null | grep -q "^$toolchain-"
  else
    ! have cargo || ! have rustc ||
      [ "$(printf '%s\n' "$toolchain" "$(rustc --version | cut -d' ' -f2)" | sort -V | head -n 1)" != "$toolchain" ]
  fi
}

# `missing` holds descriptions for the user, `packages` the Debian packages to install.
missing=() packages=() java_problem=
need() { # description, Debian packages...
  local what=$1; shift
  missing+=("$what"); packages+=("$@")
}
look() { # argument "page-tests" also requires a browser
  missing=() packages=()
  find_java
  [ $? -ne 1 ] || need "JDK 17" openjdk-17-jdk-headless
  have mvn || need "Maven" maven
  ! node_is_missing || need "Node 18 or later with npm" nodejs npm
  { have gcc && have g++; } || need "a C and C++ compiler" gcc g++ libc6-dev
  have make || need "make" make
  have cmake || need "cmake" cmake
  have pkg-config || need "pkg-config" pkg-config
  have curl || need "curl" curl
  [ -e /etc/ssl/certs/ca-certificates.crt ] || need "CA certificates" ca-certificates
  if [ "${1:-}" = page-tests ]; then
    have chromium || have google-chrome || need "Chromium, for the browser tests of the page" chromium
  fi
  if rust_is_missing; then missing+=("Rust $toolchain"); rust_missing=1; else rust_missing=; fi
}

rust_command() {
  if have rustup; then
    printf 'rustup toolchain install %s --profile minimal --component clippy --component rustfmt' "$toolchain"
  else
    printf "curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --default-toolchain %s --component clippy --component rustfmt" "$toolchain"
  fi
}

# Prints one command that installs everything that is missing.
the_command() {
  local command=
  if [ ${#packages[@]} -gt 0 ]; then
    command="apt-get update && apt-get install -y --no-install-recommends ${packages[*]}"
    # The JDK package fails to install without this folder, and slim images do not have it.
    [ -d /usr/share/man/man1 ] || command="mkdir -p /usr/share/man/man1 && $command"
    [ "$(id -u)" = 0 ] || command="sudo sh -c '$command'"
  fi
  if [ -n "$rust_missing" ]; then command="${command:+$command && }$(rust_command)"; fi
  printf '%s' "$command"
}

report_missing() {
  local what
  for what in "${missing[@]}"; do say "missing: $what"; done
  say "to install everything, run:"
  say "  $(the_command)"
}

# Makes sure that everything the build needs is installed: installs it as root, otherwise reports it and exits.
require() {
  look "$@"
  [ -z "$java_problem" ] || die "$java_problem"
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ] || ! have apt-get; then
    report_missing
    exit 1
  fi
  say "installing what is missing as root: ${missing[*]}"
  if [ ${#packages[@]} -gt 0 ]; then
    say "  apt-get install ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { mkdir -p /usr/share/man/man1 && apt-get -qq update && apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null; } ||
      die "apt-get could not install the packages; see its output above"
  fi
  if [ -n "$rust_missing" ]; then
    say "  $(rust_command)"
    sh -c "$(rust_command)" >&2 ||
      die "the Rust toolchain could not be installed; see the output above, or https://rustup.rs for other ways to install it"
    PATH="$HOME/.cargo/bin:$PATH"
  fi
  look "$@"
  [ ${#missing[@]} -eq 0 ] || { report_missing; die "still missing after the installation"; }
}

# Builds the page if it is older than its sources. The dashboard embeds it, so it must be built first.
build_page() {
  local web=crates/metrics-dashboard/web stamp=crates/metrics-dashboard/web/node_modules/.page-built
  [ -e "$web/package.json" ] || return 0
  if [ -e "$web/dist/index.html" ] && [ -e "$stamp" ] &&
    [ -z "$(find "$web" \( -name node_modules -o -name dist -o -name ".?*" \) -prune -o -type f -newer "$stamp" -print -quit)" ]; then
    return 0
  fi
  say "building the page"
  (cd "$web" && npm ci --no-audit --no-fund --loglevel=error >&2 && npm run --silent build >&2) ||
    die "the page could not be built; see the output of npm above"
  : >"$stamp"
}

# Builds the workspace and sets `programs` to the folder of its programs. The profile is "release" or "dev"; further
# arguments are options of cargo.
build() {
  # The tests use failpoints to kill the processor at specific steps.
  local profile=$1 flag='--features stream-processor/failpoints' folder=debug
  shift
  if [ "$profile" = release ]; then flag=--release folder=release; fi
  build_page
  say "building the programs ($profile)"
  # shellcheck disable=SC2086
  cargo build $flag --workspace "$@" || die "the programs could not be built; see the output of cargo above"
  # shellcheck disable=SC2034 # the scripts that source this execute them
  programs=$target/$folder
}

# Implements ./run doctor. Changes nothing and reports to stdout.
doctor() {
  local healthy=0
  exec 2>&1
  look
  if [ -n "$java_problem" ]; then say "fail  $java_problem"; healthy=1; fi
  if [ ${#missing[@]} -gt 0 ]; then report_missing; healthy=1; else say "ok    tools    nothing is missing"; fi
  if [ -x "$target/release/local-stack" ]; then
    "$target/release/local-stack" doctor "$@" || healthy=1
  else
    # local-stack makes these checks precisely, but it is not built yet. Check the same limits here.
    local free_mib disk_mib port
    free_mib=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)
    disk_mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
    if [ "$free_mib" -ge 2636 ]; then say "ok    memory   $free_mib MiB available"; else say "fail  memory   $free_mib MiB available, 2636 MiB needed"; healthy=1; fi
    # A first build writes about 6 GiB.
    if [ "$disk_mib" -ge 8192 ]; then say "ok    disk     $disk_mib MiB free"; else say "fail  disk     $disk_mib MiB free, 8192 MiB needed to build and start"; healthy=1; fi
    for port in 9092 9093 9042 7000 7199 9404 9405 8090 9101 9102 8050 9090; do
      if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        say "fail  port     $port is in use; free it, or move all ports with --port-base 20000"; healthy=1
      fi
    done
  fi
  return $healthy
}
